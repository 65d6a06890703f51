"""MLX's memory limits: what is set, that it is put back, and what is refused; MLX's own functions
are replaced by a device of our choice, and one test asks the real ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.commands import captured_display, small_run

from mlx_simpo import MemoryConfig, SimPOError, evaluate, generate, load_config, train
from mlx_simpo.errors import InvalidSettingsError
from mlx_simpo.planning.memory import limit_bytes
from mlx_simpo.planning.memory_limits import (
    DEFAULT_CACHE_BYTES,
    gigabytes,
    memory_limits,
    set_memory_limits,
)

GB = 10**9
METAL = {"memory_size": 16 * GB, "max_recommended_working_set_size": 11 * GB}
# MLX's own: on Metal, the cache may take whatever there is.
OWN = {"memory": 15 * GB, "cache": 15 * GB, "wired": 0}


class Limits:
    """What stands for MLX's limits, and every value that they have had.

    before: values that were set beforehand.
    """

    def __init__(self, patch: pytest.MonkeyPatch, before: dict[str, int]) -> None:
        self.now = dict(before)
        self.history: list[tuple[str, int]] = []
        for name in before:
            patch.setattr(mx, f"set_{name}_limit", lambda size, name=name: self._set(name, size))

    def _set(self, name: str, size: int) -> int:
        before, self.now[name] = self.now[name], size
        self.history.append((name, size))
        return before


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """A Mac of 16 GB whose GPU may use 11."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: METAL)
    return Limits(monkeypatch, OWN)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """A machine without a GPU, of 16 GB."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr("mlx_simpo.planning.memory_limits.device_memory_bytes", lambda: 16 * GB)
    return Limits(monkeypatch, {"memory": 13 * GB, "cache": 32 * 2**20, "wired": 0})


def test_by_default_the_cache_is_bounded_and_what_metal_recommends_is_wired(mac: Limits) -> None:
    with memory_limits(MemoryConfig()):
        assert mac.now == {"memory": 15 * GB, "cache": DEFAULT_CACHE_BYTES, "wired": 11 * GB}
    assert mac.now == OWN


def test_a_cache_that_is_smaller_by_itself_stays_so(cpu: Limits) -> None:
    """On a CPU, MLX keeps 32 MiB; a training needs no more."""
    before = dict(cpu.now)
    with memory_limits(MemoryConfig()):
        assert cpu.now == before
    assert cpu.now == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"limit_gb": 16.0}, {"memory": 16 * GB}),
        ({"limit_gb": 0.5}, {"memory": GB // 2}),
        ({"cache_limit_gb": 0.0}, {"cache": 0}),
        ({"cache_limit_gb": 4.0}, {"cache": 4 * GB}),
        ({"wired_limit_gb": 0.0}, {"wired": 0}),
        ({"wired_limit_gb": 11.0}, {"wired": 11 * GB}),
    ],
)
def test_each_setting_is_its_limit(
    settings: dict[str, float], expected: dict[str, int], mac: Limits
) -> None:
    default = {"memory": 15 * GB, "cache": DEFAULT_CACHE_BYTES, "wired": 11 * GB}
    with memory_limits(MemoryConfig(**settings)):
        assert mac.now == default | expected
    assert mac.now == OWN


def test_the_limits_are_put_back_after_an_exception(mac: Limits) -> None:
    settings = MemoryConfig(limit_gb=2.0, cache_limit_gb=0.1, wired_limit_gb=1.0)
    with pytest.raises(KeyboardInterrupt), memory_limits(settings):
        raise KeyboardInterrupt
    assert mac.now == OWN


def test_set_again_the_limits_are_the_same_and_stay(mac: Limits) -> None:
    """As `prepare` does within `train`, and without it."""
    settings = MemoryConfig(limit_gb=2.0)
    with memory_limits(settings):
        within = dict(mac.now)
        set_memory_limits(settings)
        assert mac.now == within
    assert mac.now == OWN
    set_memory_limits(settings)
    assert mac.now == within


def refusal(**settings: float) -> tuple[str, ...]:
    """Return what `memory_limits` says to settings that it refuses."""
    with pytest.raises(InvalidSettingsError) as caught, memory_limits(MemoryConfig(**settings)):
        pass
    return caught.value.messages


def test_more_than_the_machine_has_is_refused_all_at_once(mac: Limits) -> None:
    assert refusal(limit_gb=17.0, cache_limit_gb=16.5, wired_limit_gb=12.0) == (
        "memory.limit_gb is 17, but MLX's device has 16 GB of memory; set less, or leave it out",
        "memory.cache_limit_gb is 16.5, but MLX's device has 16 GB of memory; set less, or leave "
        "it out",
        "memory.wired_limit_gb is 12, but Metal allows 11; set less, or raise what it allows with "
        "sudo sysctl iogpu.wired_limit_mb=N",
    )
    assert mac.now == OWN
    assert not mac.history


def test_nothing_can_be_wired_without_metal(cpu: Limits) -> None:
    (message,) = refusal(wired_limit_gb=2.0)
    assert message == (
        "memory.wired_limit_gb is 2, but only Metal on macOS can keep memory from being paged out, "
        "and MLX does not run on Metal here; leave it out, or set 0"
    )
    assert not cpu.history
    with memory_limits(MemoryConfig(wired_limit_gb=0.0)):
        assert cpu.now["wired"] == 0


def test_the_forecast_compares_with_the_limit_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_simpo.planning.memory.memory_limit_bytes", lambda: 11 * GB)
    assert limit_bytes(MemoryConfig()) == 11 * GB
    assert limit_bytes(MemoryConfig(limit_gb=2.5)) == 2_500_000_000


def test_gigabytes_have_three_digits() -> None:
    assert [gigabytes(n) for n in (1.2345e11, 1.2345e10, 1.2345e9, 1.2345e7)] == [
        "123 GB",
        "12.3 GB",
        "1.23 GB",
        "0.0123 GB",
    ]


def test_mlx_keeps_no_more_than_the_limit_of_its_cache() -> None:
    """What replaces a cache that is cleared by hand: MLX itself gives back what is beyond it."""

    def cached(limit: float) -> int:
        with memory_limits(MemoryConfig(cache_limit_gb=limit)):
            for size in range(1, 40):  # each size differs, so that no buffer serves another array
                mx.eval(mx.ones(size * 100_000))
            return mx.get_cache_memory()

    assert cached(0.0) == 0
    assert 0 < cached(0.02) <= 36_000_000  # on a GPU, at most one array more
    assert cached(0.2) > 36_000_000


# --- in commands -----------------------------------------------------------------------------

SETTINGS = ("memory.limit_gb=3", "memory.cache_limit_gb=0.25")
EXPECTED = {"memory": 3 * GB, "cache": GB // 4}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The limits at each evaluation of a model and each of its responses."""
    limits = Limits(monkeypatch, {"memory": 8 * GB, "cache": 8 * GB})
    seen: list[dict[str, Any]] = []
    for path in (
        "mlx_simpo.training.session.evaluate_pairs",
        "mlx_simpo.sampling.generate.stream_generate",
        "mlx_simpo.training.trainer.submit_update",
    ):
        module, name = path.rsplit(".", 1)
        original = getattr(__import__(module, fromlist=[name]), name)

        def watching(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(dict(limits.now))
            return original(*args, **kwargs)

        monkeypatch.setattr(path, watching)
    yield seen
    assert limits.now == {"memory": 8 * GB, "cache": 8 * GB}  # as before the command


def test_a_run_keeps_to_its_limits(
    model_folder: Path, pairs_file: Path, tmp_path: Path, recorded: list[dict[str, Any]]
) -> None:
    settings = small_run(model_folder, pairs_file, tmp_path / "run", *SETTINGS)
    train(load_config(None, settings), captured_display()[0])
    assert len(recorded) > 1
    assert all(limits == EXPECTED for limits in recorded)


def test_evaluation_and_generation_keep_to_their_limits(
    model_folder: Path, pairs_file: Path, recorded: list[dict[str, Any]]
) -> None:
    settings = [f"model={model_folder}", f"data.valid={pairs_file}", *SETTINGS]
    evaluate(load_config(None, settings), display=captured_display()[0])
    assert recorded == [EXPECTED]
    generate(load_config(None, settings), "a", max_tokens=2, display=captured_display()[0])
    assert recorded == [EXPECTED, EXPECTED]


def test_a_limit_beyond_the_machine_ends_a_run_before_anything_is_read(tmp_path: Path) -> None:
    settings = [f"output={tmp_path / 'run'}", "model=none", "data.train=none"]
    config = load_config(None, [*settings, "memory.limit_gb=1e6"])
    message = r"^memory\.limit_gb is 1e\+06, but MLX's device has .* GB of memory"
    with pytest.raises(SimPOError, match=message):
        train(config, captured_display()[0])
    assert not (tmp_path / "run").exists()
