"""Cached tokens equal those of encoding again, or are rebuilt; no folder is ever incomplete."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import BARE, some_pairs, tiny_tokenizer, write_jsonl

from mlx_simpo import DataConfig, SimPOError, load_pairs
from mlx_simpo.data import cache
from mlx_simpo.data.cache import (
    TokenizedSource,
    load_folder,
    load_or_tokenize,
    token_cache_folder,
)
from mlx_simpo.data.encode import EncodedPair, Encoder, encode_pairs
from mlx_simpo.data.keys import short_sha256
from mlx_simpo.data.pairs import Quarantined
from mlx_simpo.data.sources import open_hub, open_source
from mlx_simpo.data.tokens import FILES

BAD = {"prompt": "q\ud800", "chosen": "", "rejected": "b"}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_SIMPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows: list[Any] = [*some_pairs(20), BAD, *some_pairs(5)]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


class ProgressRecorder:
    """A progress bar that records what it is told."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    @contextmanager
    def __call__(self, total: int) -> Iterator[Callable[[int], None]]:
        self.total = total

        def advance(rows: int) -> None:
            self.done += rows

        yield advance


def load(data: Path, progress: ProgressRecorder | None = None, **config: Any) -> TokenizedSource:
    encoder = Encoder(tiny_tokenizer(), DataConfig(**config))
    return load_or_tokenize(encoder, open_source(str(data)), progress or ProgressRecorder())


def plain(pairs: Iterable[EncodedPair]) -> list[tuple]:
    """Pairs as values that compare with ==."""
    return [
        (
            p.chosen.tokens.tolist(),
            p.rejected.tokens.tolist(),
            p.chosen.score_start,
            p.index,
            p.source,
        )
        for p in pairs
    ]


def expected(data: Path, **config: Any) -> list[tuple]:
    """The pairs of `load`, encoded one after the other without files."""
    encoder = Encoder(tiny_tokenizer(), DataConfig(**config))
    pairs, _ = encode_pairs(encoder, load_pairs(str(data)).pairs)
    return plain(pairs)


def folders(root: Path) -> list[Path]:
    return sorted(root.iterdir())


# --- built once, then loaded -----------------------------------------------------------------


def test_the_second_run_loads_the_tokens(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = ProgressRecorder()
    first = load(data, progress)
    assert (progress.total, progress.done) == (26, 26)
    (folder,) = folders(root)
    size = r"\(0\.\d MB; the whole cache: 0\.\d MB; "
    assert re.search(f"cached for the next run in {folder} {size}", first.note)
    monkeypatch.setattr(cache, "write_tokens", lambda *a: pytest.fail("was tokenized again"))
    second = load(data)
    assert second.note == f"tokens are loaded from the cache in {folder}"
    assert plain(first.pairs) == plain(second.pairs) == expected(data)
    assert list(first.pairs.prompts()) == list(second.pairs.prompts())
    assert first.quarantined == second.quarantined
    assert first.quarantined == [Quarantined(f"{data}:21", "empty response", "chosen")]
    assert first.warnings == second.warnings == []


def test_each_setting_has_a_folder_of_its_own(data: Path, root: Path) -> None:
    configs: list[dict[str, Any]] = [
        {},
        {"chat_template": BARE},
        {"max_length": 40, "max_prompt_length": 30},
    ]
    for _ in range(2):
        for config in configs:
            assert plain(load(data, **config).pairs) == expected(data, **config)
    assert len(folders(root)) == 3


def test_changed_data_is_tokenized_again(data: Path, root: Path) -> None:
    load(data)
    with data.open("a") as lines:
        lines.write(json.dumps(some_pairs(1)[0]) + "\n")
    assert len(load(data).pairs) == 26
    write_jsonl(data, some_pairs(3))
    assert plain(load(data).pairs) == expected(data)
    assert len(folders(root)) == 3


def test_a_source_without_a_key_is_tokenized_each_time_and_says_so(data: Path, root: Path) -> None:
    encoder, source = Encoder(tiny_tokenizer(), DataConfig()), open_source(str(data))
    for _ in range(2):
        result = load_or_tokenize(encoder, replace(source, files=()), ProgressRecorder())
        assert plain(result.pairs) == expected(data)
        assert re.match(r"tokens are not cached for the next run: .* has no files", result.note)
        assert folders(root) == []


def test_a_hub_dataset_is_identified_by_its_arrow_files(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    file = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    encoder, notes = Encoder(tiny_tokenizer(), DataConfig()), []
    for count in (3, 3, 4):  # the second time the same, then a new commit of the dataset
        pq.write_table(pa.Table.from_pylist(some_pairs(count)), file)
        source = open_hub(str(tmp_path / "set"), "train", None)
        result = load_or_tokenize(encoder, source, ProgressRecorder())
        assert [pair.index for pair in result.pairs] == list(range(count))
        notes.append(result.note.partition(" in ")[0])
    new = "tokens are cached for the next run"
    assert notes == [new, "tokens are loaded from the cache", new]
    assert len(folders(root)) == 2


def test_the_environment_decides_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    for variables, folder in (
        ({"MLX_SIMPO_CACHE": "/m", "XDG_CACHE_HOME": "/x"}, "/m/tokens"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/mlx_simpo/tokens"),
        ({"MLX_SIMPO_CACHE": ""}, "/h/.cache/mlx_simpo/tokens"),
    ):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("MLX_SIMPO_CACHE", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(token_cache_folder()) == folder


def test_other_users_cannot_read_the_prompts(data: Path, root: Path) -> None:
    load(data)
    assert folders(root)[0].stat().st_mode & 0o077 == 0


# --- damaged ---------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_folder_is_rebuilt_with_a_warning(data: Path, root: Path, name: str) -> None:
    load(data)
    (folder,) = folders(root)
    pairs = expected(data)
    for damage in (cut, grow, flip, empty, Path.unlink):
        damage(folder / name)
        result = load(data)
        (warning,) = result.warnings
        assert warning.startswith(f"the cached tokens in {folder} are damaged ("), damage
        assert warning.endswith("); tokenizing again")
        assert plain(result.pairs) == pairs
        assert folders(root) == [folder]
        again = load(data)
        assert (again.warnings, plain(again.pairs)) == ([], pairs)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"files": {}},
        {"files": {"../../secret": [1, "x"]}},
        {"files": {name: [1, 2] for name in FILES}},
        {"files": dict.fromkeys(FILES, "ab")},
        {"quarantined": {}},
        {"quarantined": [["f:1", "reason"]]},
        {"quarantined": [[1, "reason", ""]]},
        {"quarantined": "abc"},
    ],
)
def test_a_manifest_of_another_form_is_damage(data: Path, root: Path, changes: dict) -> None:
    """Even with a valid checksum; and no file outside the folder is opened."""
    load(data)
    (folder,) = folders(root)
    manifest = folder / "manifest.json"
    text = json.dumps(json.loads(manifest.read_text().splitlines()[1]) | changes)
    manifest.write_text(f"{short_sha256(text.encode())}\n{text}\n")
    (warning,) = load(data).warnings
    assert "damaged (manifest.json is not as this version writes it); tokenizing again" in warning


def test_pairs_in_use_outlive_the_folder(data: Path, root: Path) -> None:
    result = load(data)
    cache.delete_folder(folders(root)[0])
    assert folders(root) == []
    assert plain(result.pairs) == expected(data)


# --- interrupted, disk full, two at once -----------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SimPOError("no template"), MemoryError])
def test_an_interrupted_run_leaves_nothing(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    original = Encoder.encode

    def encode(self: Encoder, pair: Any) -> Any:
        if pair.index == 15:
            raise error
        return original(self, pair)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", encode)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            load(data)
    assert folders(root) == []
    assert plain(load(data).pairs) == expected(data)


@pytest.mark.parametrize("function", ["write_tokens", "write_manifest"])
def test_a_full_disk_is_reported_and_leaves_nothing(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, function, full)
    with pytest.raises(
        SimPOError, match=r"cannot write tokens to .*No space left.*MLX_SIMPO_CACHE"
    ):
        load(data)
    assert folders(root) == []


def test_a_cache_folder_that_cannot_be_created(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_SIMPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        SimPOError, match="set the environment variable MLX_SIMPO_CACHE to another folder"
    ):
        load(data)


def test_data_that_changes_while_it_is_read_is_an_error(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = cache.write_tokens

    def changing(*arguments: Any) -> Any:
        with data.open("a") as lines:
            lines.write(json.dumps(some_pairs(1)[0]) + "\n")
        return original(*arguments)

    monkeypatch.setattr(cache, "write_tokens", changing)
    with pytest.raises(SimPOError, match="changed while it was being read; start again"):
        load(data)
    assert folders(root) == []


def test_another_run_may_finish_first(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, done = cache.write_manifest, []

    def overtaken(*arguments: Any) -> None:
        original(*arguments)
        if not done:
            done.append(True)
            assert plain(load(data).pairs) == expected(data)

    monkeypatch.setattr(cache, "write_manifest", overtaken)
    assert plain(load(data).pairs) == expected(data)
    assert len(folders(root)) == 1
    assert plain(load_folder(folders(root)[0]).pairs) == expected(data)


def test_other_runs_may_delete_their_folders_at_any_time(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between listing the cache and looking into one of its folders."""
    load(data, chat_template="none")
    (other,) = folders(root)
    original = Path.iterdir

    def with_deleted_folders(folder: Path) -> Iterator[Path]:
        yield from original(folder)
        if folder == root:
            yield from (root / "unfinished-gone", root / ("0" * 32), root / "unfinished-file")

    monkeypatch.setattr(Path, "iterdir", with_deleted_folders)
    assert plain(load(data).pairs) == expected(data)
    monkeypatch.undo()
    assert other in original(root)


PROGRAM = """
import sys
from contextlib import nullcontext
sys.path.insert(0, {tests!r})
from helpers.tiny import tiny_tokenizer
from mlx_simpo import DataConfig
from mlx_simpo.data.cache import load_or_tokenize
from mlx_simpo.data.encode import Encoder
from mlx_simpo.data.sources import open_source
result = load_or_tokenize(
    Encoder(tiny_tokenizer(), DataConfig()), open_source({data!r}),
    lambda total: nullcontext(lambda rows: None),
)
pairs = result.pairs
print(sum(int(p.chosen.tokens.sum()) for p in pairs), len(pairs), result.warnings)
"""


def test_two_processes_at_once(tmp_path: Path, root: Path) -> None:
    data = write_jsonl(tmp_path / "many.jsonl", some_pairs(1500))
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), data=str(data))
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate()[0] for process in both]
    total = sum(sum(tokens) for tokens, *_ in expected(data))
    assert results == [f"{total} 1500 []\n"] * 2
    assert plain(load_folder(*folders(root)).pairs) == expected(data)


# --- deletion of what is not used ------------------------------------------------------------


def age(folder: Path, days: float) -> None:
    for path in (*folder.iterdir(), folder):
        last_used = time.time() - days * 24 * 3600
        os.utime(path, (last_used, last_used))


def test_folders_unused_for_long_are_deleted_and_nothing_else(data: Path, root: Path) -> None:
    load(data)
    (old,) = folders(root)
    load(data, chat_template="none")
    (recent,) = set(folders(root)) - {old}
    for name, days in (("unfinished-old", 2), ("unfinished-new", 0.5), ("the user's own", 400)):
        (root / name).mkdir()
        (root / name / "tokens.bin").touch()
        age(root / name, days)
    age(old, 31)
    age(recent, 29)
    cache.delete_unused(root)
    names = {"unfinished-new", "the user's own", recent.name}
    assert {folder.name for folder in folders(root)} == names


def test_a_folder_that_is_used_is_not_deleted(data: Path, root: Path) -> None:
    load(data)
    (folder,) = folders(root)
    age(folder, 40)
    load(data)
    cache.delete_unused(root)
    assert folders(root) == [folder]
