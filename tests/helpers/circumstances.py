"""Small runs under the circumstances in which a setting matters: a Mac, a GPU, a Hub …"""

import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.commands import small_run, with_bad_rows
from helpers.observed import Observed, observe
from helpers.runs import not_finite
from helpers.tiny import (
    CHATML,
    INST,
    some_pairs,
    tiny_config,
    tiny_folder,
    tiny_model,
    tiny_tokenizer,
    write_jsonl,
)
from mlx.utils import tree_map

from mlx_simpo import LoRAConfig, SimPOConfig, SimPOError, load_config
from mlx_simpo.data import sources
from mlx_simpo.engine import calibrated
from mlx_simpo.engine.figures import CPU
from mlx_simpo.kernels import choice as kernel_choice
from mlx_simpo.model import loading
from mlx_simpo.model.adapters import save_adapter
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.planning import memory_limits
from mlx_simpo.training import keep_awake, saver


@contextmanager
def quick_saves() -> Iterator[None]:
    """Saving may take as much of the time as it likes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "MAX_SHARE", 1e9)
        yield


@contextmanager
def mac() -> Iterator[None]:
    """A Mac with a terminal, on which nothing is started."""

    class Process:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def poll(self) -> int:
            return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep_awake.sys, "platform", "darwin")
        patch.setattr(keep_awake, "has_terminal", lambda: True)
        patch.setattr(keep_awake.subprocess, "Popen", Process)
        yield


@contextmanager
def metal() -> Iterator[None]:
    """A machine where Metal recommends 2 GB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_limits, "recommended_memory_bytes", lambda: 2 * 10**9)
        yield


@contextmanager
def measured() -> Iterator[None]:
    """A GPU whose figures are measured in no time."""
    with pytest.MonkeyPatch.context() as patch:
        figures = replace(CPU, pass_cost=1, max_positions=64, source="measured")
        patch.setattr(calibrated, "is_gpu", lambda: True)
        patch.setattr(
            calibrated, "load_or_calibrate", lambda *_: types.SimpleNamespace(figures=figures)
        )
        yield


@contextmanager
def kernel() -> Iterator[None]:
    """A GPU on which the kernel computes as MLX's own operations do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_choice, "backend", lambda: "Metal")
        patch.setattr(kernel_choice, "check_kernel", lambda gpu: None)
        patch.setattr(kernel_choice, "kernel_response_logps", kernel_choice.BUILT_IN.response_logps)
        yield


@contextmanager
def hub(root: Path) -> Iterator[None]:
    """A Hub with a model of two revisions, and a dataset of two splits and two subsets."""

    def snapshot(name: str, *, revision: str | None, **_: Any) -> str:
        return str(root / ("model" if revision is None else revision))

    def dataset(name: str, split: str | None, subset: str | None) -> Any:
        return sources.open_source(str(root / f"{subset or split or 'pairs'}.jsonl"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "snapshot_download", snapshot)
        patch.setattr(sources, "open_hub", dataset)
        yield


def write_files(root: Path) -> None:
    """Write models, an adapter and data of the kinds that the settings are about."""
    for name, seed in (("model", 0), ("second", 1), ("bos", 0)):
        tiny_folder(root / name, seed)
    tiny_tokenizer(INST, bos="<s>")._tokenizer.save_pretrained(root / "bos")
    shutil.copytree(root / "model", root / "custom")
    (root / "custom" / "config.json").write_text(
        str(tiny_config() | {"model_file": "code.py"}).replace("'", '"').replace("True", "true")
    )
    (root / "custom" / "code.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    model = tiny_model()
    adapter = attach_lora(model, LoRAConfig(rank=2), seed=0)
    mx.random.seed(7)
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.1, model.trainable_parameters()))
    save_adapter(root / "adapter", model, adapter | {"model": str(root / "model")})
    pairs, more = some_pairs(12), some_pairs(40)
    other = [r | {"prompt": f"Something else: {r['prompt']}"} for r in more[12:22]]
    valid = [r | {"prompt": f"{i} is held out?"} for i, r in enumerate(more[22:27])]
    write_jsonl(root / "pairs.jsonl", pairs)
    write_jsonl(root / "other.jsonl", other)
    write_jsonl(root / "valid.jsonl", valid)
    for folder in ("splits", "folder"):
        (root / folder).mkdir()
    for name, rows in (("train", pairs), ("test", other), ("valid", valid)):
        write_jsonl(root / "splits" / f"{name}.jsonl", rows)
    write_jsonl(root / "folder" / "train.jsonl", other)
    write_jsonl(root / "folder" / "valid.jsonl", pairs[:4])
    write_jsonl(
        root / "questions.jsonl",
        [{"q": r.pop("prompt"), "q2": f"Or {n}?"} | r for n, r in enumerate(some_pairs(12))],
    )
    write_jsonl(
        root / "thinking.jsonl",
        [r | {"chosen": f"<think>So {i}.</think>{r['chosen']}"} for i, r in enumerate(pairs)],
    )
    write_jsonl(
        root / "strings.jsonl",
        [{k: f"{r['prompt']} {r[k]}" for k in ("chosen", "rejected")} for r in pairs],
    )
    with_bad_rows(root / "bad.jsonl", 12, (3,))
    template = CHATML.replace("Be kind.", "Be {{ style or 'kind' }}.")
    (root / "style.jinja").write_text(template)


CIRCUMSTANCES: dict[str, Callable[["Lab"], AbstractContextManager[None]]] = {
    "": lambda _: nullcontext(),
    "not finite": lambda _: not_finite(2),
    "quick saves": lambda _: quick_saves(),
    "mac": lambda _: mac(),
    "metal": lambda _: metal(),
    "measured": lambda _: measured(),
    "kernel": lambda _: kernel(),
    "hub": lambda lab: hub(lab.root),
    "finished": lambda lab: finished(lab),
}


class Lab:
    """Runs, each of which is observed once.

    Args:
        root: the folder of `write_files`, which is @ in settings.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._observed: dict[tuple[str, str], Observed] = {}

    def config(self, settings: str) -> SimPOConfig:
        more = ["data.valid=@/valid.jsonl", "train.memory_check=off", "train.adam_epsilon=1e-3"]
        more += ["train.steps=2", *settings.split()]
        run = small_run(self.root / "model", self.root / "pairs.jsonl", self.root / "run", *more)
        return load_config(None, [word.replace("@", str(self.root)) for word in run])

    def run(self, settings: str, where: str) -> Observed:
        """Return what is observed of a run with these settings, which may be rejected."""
        key = (settings, where)
        if key not in self._observed:
            try:
                config = self.config(settings)
            except SimPOError as error:
                return {"rejected": str(error)}
            with CIRCUMSTANCES[where](self):
                self._observed[key] = observe(config)
            shutil.rmtree(config.output, ignore_errors=True)
        return self._observed[key]


@contextmanager
def finished(lab: Lab) -> Iterator[None]:
    """The run's folder has a run already."""
    observe(lab.config(""))
    yield
