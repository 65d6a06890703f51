"""Every setting of the configuration does what it says: a run with another value differs there, and
nowhere else.

The settings are those that are declared (mlx_simpo/config), each with the values that its type has.
CASES says what becomes of a run with another value: exactly which aspects of it differ
(helpers/observed.py has them), or why it is rejected. A setting without cases fails, and so does
one that is ignored: no aspect differs then.
"""

import shutil
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import pytest
from helpers.commands import small_run, with_bad_rows
from helpers.observed import NUMBERS, Observed, differences, observe
from helpers.runs import not_finite
from helpers.settings import SETTINGS
from helpers.tiny import CHATML, some_pairs, tiny_config, tiny_folder, tiny_model, write_jsonl
from mlx.utils import tree_map

from mlx_simpo import LoRAConfig, SimPOConfig, SimPOError, SourceConfig, load_config
from mlx_simpo.config.schema import all_settings
from mlx_simpo.config.value_types import union_members
from mlx_simpo.data import sources
from mlx_simpo.engine import calibrated
from mlx_simpo.engine.figures import CPU
from mlx_simpo.kernels import choice as kernel_choice
from mlx_simpo.model import loading
from mlx_simpo.model.adapters import save_adapter
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.planning import memory_limits
from mlx_simpo.training import keep_awake, saver

# --- circumstances ---------------------------------------------------------------------------


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
        patch.setattr(
            kernel_choice, "kernel_response_logps", kernel_choice.BUILT_IN.response_logps
        )
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


# --- cases -----------------------------------------------------------------------------------


class Case(NamedTuple):
    """What becomes of a run with another value of a setting.

    value: as on the command line; @ is the folder of `files`.
    differs: the aspects that differ, with commas between them; "loss 1 …" is that one of NUMBERS
        and all that follow from it. Or, after "rejected:", how the message begins or goes on.
    base: settings of both runs. beside: settings that only the other run has.
    where: the circumstances of both.
    """

    value: str
    differs: str
    base: str = ""
    beside: str = ""
    where: str = ""

    def other(self, name: str) -> str:
        """Return the settings of the other run."""
        return f"{self.base} {name.partition('[]')[0]}={self.value} {self.beside}"

    def aspects(self) -> list[str]:
        """Return the aspects that differ, in order."""
        *names, last = self.differs.split(", ")
        if last.endswith(" …"):
            first = NUMBERS.index(last.removesuffix(" …"))
            return sorted([*names, *NUMBERS[first:]])
        return sorted([*names, last])


VALID = "validation sets, validation records, validation tokens, evaluation before, result"
PAIRS = "records, tokens, order, micro-batches, positions"
TOKENS = "tokens, validation tokens, evaluation before, result"
HELD = "data.valid=null data.valid_fraction=0.25"
FOLDER = "data.train=@/splits data.train_split=train"
NAMED = 'data.valid={"chat":"@/valid.jsonl","code":"@/other.jsonl"} train.eval_every=1'
STYLE = "data.chat_template=@/style.jinja"
EPOCHS = "train.steps=null"
STOPPING = "train.eval_every=1 train.early_stopping.patience=1"
MATRICES = "adapter, initial weights"

CASES: dict[str, list[Case]] = {
    "model": [Case("@/second", "model, evaluation before, result, loss 1 …")],
    "revision": [
        Case("second", "model, evaluation before, result, loss 1 …", "model=a/b", where="hub"),
        Case("second", "rejected:revision is 'second', but @/model is a local folder"),
    ],
    "trust_remote_code": [
        Case("false", "rejected:@/custom cannot be loaded", "model=@/custom trust_remote_code=true")
    ],
    "dtype": [
        Case("bfloat16", "model, evaluation before, result, loss 1 …"),
        Case("float16", "model, evaluation before, result, loss 1 …"),
        Case("float32", "model, evaluation before, result, loss 1 …", "dtype=bfloat16"),
    ],
    "output": [Case("@/elsewhere", "output")],
    "seed": [Case("7", "order, micro-batches, positions, initial weights, loss 1 …")],
    "data.train": [Case("@/other.jsonl", f"{PAIRS}, sources, loss 1 …")],
    "data.train_split": [
        Case("test", f"{PAIRS}, loss 1 …", FOLDER),
        Case("null", "rejected:@/splits holds several splits", FOLDER),
    ],
    "data.valid": [
        Case("@/other.jsonl", f"{VALID}, evaluation after"),
        Case("null", f"{VALID}, evaluation after"),
    ],
    "data.valid_split": [
        Case("test", f"{VALID}, evaluation after", "data.valid=@/splits data.valid_split=valid"),
        Case("null", "rejected:several", "data.valid=@/splits data.valid_split=valid"),
    ],
    "data.valid_main": [Case("code", "main set, result", NAMED)],
    "data.folder": [
        Case("@/folder", f"{PAIRS}, {VALID}, loss 1 …", "data.valid=null data.folder=@/splits")
    ],
    "data.subset": [
        Case("other", f"{PAIRS}, loss 1 …", "data.train=a/b", where="hub"),
        Case("other", "rejected:data.subset is 'other', but @/pairs.jsonl is local"),
    ],
    "data.columns": [
        Case('{"prompt":"q2"}', "tokens, positions, loss 1 …", 'data.train=@/questions.jsonl data.columns={"prompt":"q"}'),
        Case("null", "rejected:columns", 'data.train=@/questions.jsonl data.columns={"prompt":"q"}'),
    ],
    "data.max_samples": [Case("6", f"{PAIRS}, loss 1 …")],
    "data.valid_max": [
        Case("1", f"{VALID}, evaluation after"),
        Case("null", f"{VALID}, evaluation after", "data.valid_max=1"),
    ],
    "data.valid_fraction": [Case("0.5", f"{PAIRS}, {VALID}, loss 1 …", HELD)],
    "data.max_length": [Case("40", f"{TOKENS}, positions, loss 1 …", "data.max_prompt_length=20")],
    "data.max_prompt_length": [
        Case("10", f"{TOKENS}, positions, loss 1 …", "data.max_length=40 data.max_prompt_length=30")
    ],
    "data.chat_template": [Case("none", f"{TOKENS}, positions, files, loss 1 …")],
    "data.template_args": [
        Case('{"style":"good"}', f"{TOKENS}, loss 1 …", STYLE),
    ],
    "data.score": [
        Case("after_thinking", f"{TOKENS}, loss 1 …", "data.train=@/thinking.jsonl"),
    ],
    "data.compat": [Case("official", f"{TOKENS}, loss 1 …")],
    "data.implicit_string_prompts": [
        Case("false", "rejected:quarantined", "data.train=@/strings.jsonl "
             "data.implicit_string_prompts=true")
    ],
    "data.max_quarantined": [
        Case("0.01", "rejected:quarantined", "data.train=@/bad.jsonl data.max_quarantined=0.5")
    ],
    "objective.beta": [Case("3", "evaluation before, result, loss 1 …")],
    "objective.gamma_beta_ratio": [Case("0.1", "evaluation before, result, loss 1 …")],
    "objective.loss_type": [Case("hinge", "evaluation before, result, loss 1 …")],
    "objective.label_smoothing": [Case("0.2", "evaluation before, result, loss 1 …")],
    "objective.sft_weight": [Case("1", "evaluation before, result, loss 1 …")],
    "lora.rank": [Case("3", f"{MATRICES}, gradient 1 …")],
    "lora.lora_alpha": [Case("1", "adapter, gradient 1 …")],
    "lora.scale": [Case("1", "adapter, gradient 1 …")],
    "lora.dropout": [
        # B is not zero: dropout changes the first loss, but no evaluation with these weights.
        Case("0.5", "adapter, loss 1 …", "lora.init_from=@/adapter")
    ],
    "lora.rslora": [Case("true", "adapter, gradient 1 …")],
    "lora.dora": [Case("true", f"{MATRICES}, gradient 1 …")],
    "lora.target_modules": [Case("[q_proj]", f"{MATRICES}, gradient 1 …")],
    "lora.num_layers": [Case("1", f"{MATRICES}, gradient 1 …")],
    "lora.init_from": [
        Case("@/adapter", "initial weights, evaluation before, result, loss 1 …")
    ],
    "train.engine": [Case("reference", "engine, micro-batches, positions, traces")],
    "train.batch_size": [
        Case("4", "micro-batches, positions", beside="train.gradient_accumulation_steps=1")
    ],
    "train.max_tokens_per_step": [Case("60", "micro-batches, positions, evaluated batches")],
    "train.gradient_accumulation_steps": [Case("1", "order, micro-batches, positions, loss 1 …")],
    "train.epochs": [Case("2", "steps, rates, checkpoints, evaluations, weights 2 …", EPOCHS)],
    "train.steps": [Case("2", "steps, rates, checkpoints, evaluations, weights 2 …")],
    "train.learning_rate": [Case("5e-3", "rates, weights 1 …")],
    "train.schedule": [
        Case("linear", "rates, weights 2 …"),
        Case("constant", "rates, weights 2 …"),
    ],
    "train.warmup_ratio": [Case("0.4", "rates, weights 1 …")],
    "train.weight_decay": [Case("0.5", "weights 1 …")],
    "train.adam_beta1": [Case("0.5", "first moment, weights 2 …")],
    "train.adam_beta2": [Case("0.9", "second moment, weights 2 …")],
    "train.adam_epsilon": [Case("1e-2", "weights 1 …")],
    "train.max_grad_norm": [
        Case("0.5", "first moment, second moment, weights 1 …"),
        Case("null", "first moment, second moment, weights 1 …"),
    ],
    "train.gradient_checkpointing": [Case("true", "checkpointed layers")],
    "train.compile": [
        Case("true", "traces", "train.engine=reference train.compile=false"),
        Case("null", "traces", "train.engine=reference train.compile=false"),
        Case("true", "rejected:train.compile is true, but only the reference engine can"),
    ],
    "train.on_nonfinite": [
        Case("stop", "rejected:the loss of step 2", "train.on_nonfinite=skip", where="not finite")
    ],
    "train.max_skipped": [
        Case("0", "rejected:the loss of step 2", "train.on_nonfinite=skip", where="not finite")
    ],
    "train.eval_every": [Case("1", "evaluations, files")],
    "train.early_stopping.metric": [
        Case("rewards/accuracies", "steps, stopped early", STOPPING),
        Case("rewards/margins", "steps, stopped early", STOPPING),
    ],
    "train.early_stopping.patience": [
        Case("1", "steps, stopped early", STOPPING)
    ],
    "train.early_stopping.min_delta": [Case("9", "steps, stopped early", STOPPING)],
    "train.sample_prompts": [Case("[Hello]", "samples, files")],
    "train.sample_tokens": [Case("3", "samples", "train.sample_prompts=[Hello]")],
    "train.save_every": [Case("1", "checkpoints", "train.keep_checkpoints=9")],
    "train.save_minutes": [
        Case("1e-9", "checkpoints", "train.keep_checkpoints=9", where="quick saves"),
        Case("null", "checkpoints", "train.keep_checkpoints=9 train.save_minutes=1e-9",
             where="quick saves"),
    ],
    "train.keep_checkpoints": [Case("1", "checkpoints", "train.save_every=1")],
    "train.resume": [
        Case("never", "rejected:holds a run", "train.resume=auto", where="finished")
    ],
    "train.memory_check": [
        Case("error", "rejected:memory", "memory.limit_gb=1e-4 train.memory_check=warn"),
        Case("off", "warnings", "memory.limit_gb=1e-4 train.memory_check=warn"),
    ],
    "train.keep_awake": [
        Case("true", "caffeinate", "train.keep_awake=false", where="mac"),
        Case("null", "caffeinate", "train.keep_awake=false", where="mac"),
    ],
    "logps.impl": [
        Case("auto", "engine", "logps.impl=mlx", where="kernel"),
        Case("kernel", "engine", "logps.impl=mlx", where="kernel"),
        Case("kernel", "rejected:logps.impl is kernel, but MLX runs on the CPU"),
        Case("mlx", "engine"),
        Case("mlx", "rejected:logps.impl is mlx, but train.engine=reference",
             "train.engine=reference"),
    ],
    "engine.attention": [
        Case("mlx", "engine, fused attention", "engine.attention=blocks"),
        Case("auto", "engine", "engine.attention=blocks"),
    ],
    "engine.calibration": [Case("off", "engine, micro-batches, positions", where="measured")],
    "memory.limit_gb": [
        Case("1", "limits"),
        Case("1e-4", "rejected:memory", "train.memory_check=error"),
    ],
    "memory.cache_limit_gb": [Case("0", "limits")],
    "memory.wired_limit_gb": [
        Case("1", "limits", where="metal"),
        Case("1", "rejected:memory.wired_limit_gb is 1, but only Metal"),
    ],
    "data.train[].path": [],
    "data.train[].name": [],
    "data.train[].split": [],
    "data.train[].subset": [],
    "data.train[].columns": [],
    "data.train[].max_samples": [],
    "data.train[].weight": [],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, an adapter and data of the kinds that the settings are about."""
    root = tmp_path_factory.mktemp("settings")
    for name, seed in (("model", 0), ("second", 1)):
        tiny_folder(root / name, seed)
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
        [{"q": r["prompt"], "q2": f"Or {r['prompt']}"} | r for r in pairs],
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
    return root


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
    """Runs, each of which is observed once."""

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


@pytest.fixture(scope="module")
def lab(files: Path) -> Lab:
    return Lab(files)


SOURCE_SETTINGS = {
    f"{name}[].{item}": hint
    for name in ("data.train", "data.valid")
    for item, _, hint in all_settings(SourceConfig)
}
ALL = {name: hint for name, (_, hint) in SETTINGS.items()} | SOURCE_SETTINGS


def test_every_setting_has_cases() -> None:
    missing, unknown = ALL.keys() - CASES.keys(), CASES.keys() - ALL.keys()
    empty = {name for name, cases in CASES.items() if not cases}
    assert not missing | empty, (
        f"no test notices if these settings are ignored: {sorted(missing | empty)}; add to CASES "
        "another value of each, and in which aspects (helpers/observed.py) a run with it differs"
    )
    assert not unknown, f"CASES has settings that do not exist: {sorted(unknown)}"


def value(config: SimPOConfig, name: str) -> Any:
    """Return a setting of a configuration."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("name", SETTINGS)
def test_every_value_that_a_type_has_is_in_a_case(name: str, lab: Lab) -> None:
    """Each of several words, true and false, null and something else."""
    values = set()
    for case in CASES.get(name, []):
        for settings in (case.base, case.other(name)):
            with suppress(SimPOError):
                values.add(str(value(lab.config(settings), name)))
    required: set[Any] = set()
    for option in union_members(ALL[name]):
        if typing.get_origin(option) is Literal:
            required |= set(typing.get_args(option))
        elif option in (bool, types.NoneType):
            required |= {True, False} if option is bool else {None}
    missing = set(map(str, required)) - values
    assert not missing, f"CASES has no run with {name}={', '.join(sorted(missing))}"
    assert len(values) > 1, f"CASES has no other value of {name}"


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, cases in CASES.items() for case in cases],
    ids=lambda x: x if isinstance(x, str) else x.value[:40],
)
def test_a_setting_makes_the_difference_that_it_should(name: str, case: Case, lab: Lab) -> None:
    base, other = lab.run(case.base, case.where), lab.run(case.other(name), case.where)
    assert "rejected" not in base, base["rejected"]
    start, is_rejected, message = case.differs.partition("rejected:")
    if is_rejected:
        assert message.replace("@", str(lab.root)) in other.get("rejected", "")
        return
    assert "rejected" not in other, other["rejected"]
    expected = case.aspects()
    assert differences(base, other) == expected
    # What may change when a run goes on must not change its training by a single bit.
    if name in SETTINGS and SETTINGS[name][0].metadata["on_resume"] == "free":
        assert differences(base, other, 0.0) == expected
