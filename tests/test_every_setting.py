"""Every setting of the configuration does what it says: a run with another value differs there, and
nowhere else.

The settings are those that are declared (mlx_simpo/config), each with the values that its type has.
CASES says what becomes of a run with another value: exactly which aspects of it differ
(helpers/observed.py has them), or why it is rejected. A setting without cases fails, and so does
one that is ignored: no aspect differs then.
"""

import json
import types
import typing
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import pytest
from helpers.circumstances import Lab, write_files
from helpers.observed import NUMBERS, differences
from helpers.settings import SETTINGS

from mlx_simpo import SimPOConfig, SimPOError, SourceConfig
from mlx_simpo.config.schema import all_settings
from mlx_simpo.config.value_types import union_members


class Case(NamedTuple):
    """What becomes of a run with another value of a setting.

    value: as on the command line; @ is the folder of `write_files`.
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
            return [*names, *NUMBERS[first:]]
        return [*names, last]


def train(**source: Any) -> str:
    """Return data.train as one source with settings of its own."""
    return json.dumps([source], separators=(",", ":"))


def valid(**source: Any) -> str:
    """Return data.valid as one named set with settings of its own."""
    return json.dumps({"chat": source}, separators=(",", ":"))


def weighted(weight: int) -> str:
    """Return data.train as two sources, the first of which has this weight."""
    rows = [{"path": "@/pairs.jsonl", "weight": weight}, {"path": "@/other.jsonl", "weight": 1}]
    return json.dumps(rows, separators=(",", ":"))


PATH = f"data.train={train(path='@/pairs.jsonl')}"
VALID_PATH = f"data.valid={valid(path='@/valid.jsonl')}"
EVALUATED = "validation records, evaluation before, result, evaluation after"
VALID = f"{EVALUATED}, evaluated batches"
SHARE = "records, sources, order, micro-batches, positions"
PAIRS = f"{SHARE}, tokens"
TOKENS = "tokens, validation tokens, evaluation before, result"
HELD = "data.valid=null data.valid_fraction=0.25"
FOLDER = "data.train=@/splits data.train_split=train"
FOLDERS = "data.train=null data.valid=null data.folder=@/splits"
QUESTIONS = f'data.train=@/questions.jsonl {HELD} data.columns={{"prompt":"q"}}'
NAMED = 'data.valid={"chat":"@/valid.jsonl","code":"@/other.jsonl"} train.eval_every=1'
SHORT = "data.max_length=40 data.max_prompt_length=20"
STYLE = "data.chat_template=@/style.jinja"
EPOCHS = "train.steps=null"
STOPPING = "train.steps=4 train.eval_every=1 train.early_stopping.patience=1"
MORE_STEPS = "steps, checkpoints, evaluations"
STOPPED = f"{MORE_STEPS}, stopped early"
BETWEEN = "train.early_stopping.min_delta=0.26"
CONSTANT = f"{STOPPING} train.learning_rate=1e-30"
DRAWN = "order, micro-batches, positions, initial weights"
MATRICES = "adapter, initial weights"
# Otherwise gradients of any scale are clipped to the same norm.
UNCLIPPED = "train.max_grad_norm=null"

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
        Case("bfloat16", "model, warnings, rounding"),
        Case("float16", "model, warnings, rounding"),
        Case("float32", "model, warnings, rounding", "dtype=bfloat16"),
    ],
    "output": [Case("@/elsewhere", "output")],
    "seed": [
        Case("7", f"{DRAWN}, loss 1 …"),
        Case("7", f"{DRAWN}, records, {EVALUATED}, loss 1 …", HELD),
        Case("7", f"{DRAWN}, {EVALUATED}, validation tokens, loss 1 …", "data.valid_max=2"),
        Case("7", f"{DRAWN}, records, loss 1 …", "data.max_samples=6"),
    ],
    "data.train": [
        Case("@/other.jsonl", f"{PAIRS}, loss 1 …"),
        Case("null", "rejected:data.train"),
    ],
    "data.train_split": [
        Case("test", f"{PAIRS}, loss 1 …", FOLDER),
        Case("null", "rejected:@/splits holds several splits", FOLDER),
    ],
    "data.valid": [
        Case("@/other.jsonl", f"{VALID}, validation tokens"),
        Case("null", f"{SHARE}, {VALID}, validation tokens, loss 1 …"),
    ],
    "data.valid_split": [
        Case("test", f"{VALID}, validation tokens", "data.valid=@/splits data.valid_split=valid"),
        Case("null", "rejected:several", "data.valid=@/splits data.valid_split=valid"),
    ],
    "data.valid_main": [Case("code", "main set, result", NAMED)],
    "data.folder": [
        Case("@/folder", f"{PAIRS}, {VALID}, validation tokens, loss 1 …", FOLDERS),
        Case("null", "rejected:data.train", FOLDERS),
    ],
    "data.subset": [
        Case("other", f"{PAIRS}, loss 1 …", "data.train=a/b", where="hub"),
        Case("other", "rejected:data.subset is 'other', but @/pairs.jsonl is local"),
    ],
    "data.columns": [
        # Which pairs are held out depends on their prompts.
        Case(
            '{"prompt":"q2"}',
            f"{TOKENS}, records, order, micro-batches, positions, validation records, loss 1 …",
            QUESTIONS,
        ),
        Case("null", "rejected:@/questions.jsonl: 12 of 12 records are quarantined", QUESTIONS),
    ],
    "data.max_samples": [Case("6", f"{SHARE}, loss 1 …")],
    "data.valid_max": [
        Case("1", VALID),
        Case("null", VALID, "data.valid_max=1"),
    ],
    "data.valid_fraction": [Case("0.5", f"{SHARE}, {VALID}, loss 1 …", HELD)],
    "data.max_length": [
        Case("40", f"{TOKENS}, micro-batches, positions, loss 1 …", "data.max_prompt_length=20")
    ],
    "data.max_prompt_length": [
        Case(
            "10",
            f"{TOKENS}, micro-batches, positions, loss 1 …",
            "data.max_length=40 data.max_prompt_length=30",
        )
    ],
    "data.chat_template": [Case("none", f"{TOKENS}, positions, files, loss 1 …")],
    "data.template_args": [
        Case('{"style":"good"}', f"{TOKENS}, positions, loss 1 …", STYLE),
    ],
    "data.score": [
        Case("after_thinking", "tokens, loss 1 …", "data.train=@/thinking.jsonl"),
    ],
    "data.compat": [Case("official", f"{TOKENS}, positions, loss 1 …", f"model=@/bos {SHORT}")],
    "data.implicit_string_prompts": [
        Case(
            "false",
            "rejected:quarantined",
            "data.train=@/strings.jsonl data.implicit_string_prompts=true",
        )
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
    "lora.lora_alpha": [Case("1", "adapter, gradient 1 …", UNCLIPPED)],
    "lora.scale": [Case("1", "adapter, gradient 1 …", UNCLIPPED)],
    "lora.dropout": [
        # B is not zero: dropout changes the first loss, but no evaluation with these weights.
        Case("0.5", "adapter, loss 1 …", "lora.init_from=@/adapter")
    ],
    "lora.rslora": [Case("true", "adapter, gradient 1 …", UNCLIPPED)],
    "lora.dora": [Case("true", "adapter, gradient 1 …")],
    "lora.target_modules": [Case("[q_proj]", f"{MATRICES}, gradient 1 …")],
    "lora.num_layers": [Case("1", f"{MATRICES}, gradient 1 …")],
    "lora.init_from": [Case("@/adapter", "initial weights, evaluation before, result, loss 1 …")],
    "train.engine": [
        Case("reference", "engine, fused attention, micro-batches, positions, traces")
    ],
    "train.batch_size": [
        Case(
            "4",
            "micro-batches, positions, evaluated batches",
            beside="train.gradient_accumulation_steps=1",
        )
    ],
    "train.max_tokens_per_step": [Case("60", "micro-batches, positions, evaluated batches")],
    "train.gradient_accumulation_steps": [Case("1", "order, micro-batches, positions, loss 1 …")],
    "train.epochs": [Case("2", "steps, rates, checkpoints, evaluations, weights 2 …", EPOCHS)],
    "train.steps": [
        Case("1", "steps, checkpoints, evaluations, loss 2 …"),
        Case("null", "steps, rates, checkpoints, evaluations, weights 2 …"),
    ],
    "train.learning_rate": [Case("5e-3", "rates, weights 1 …")],
    "train.schedule": [
        Case("linear", "rates, weights 2 …", "train.steps=3"),
        Case("constant", "rates, weights 2 …", "train.steps=3"),
    ],
    "train.warmup_ratio": [Case("0.4", "rates, weights 1 …")],
    "train.weight_decay": [Case("20", "weights 1 …")],
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
        # Accuracies stay at 0 for a step. The loss falls by 0.24, while margins rise by 0.28.
        Case("rewards/accuracies", f"{STOPPED}, loss 2 …", STOPPING),
        Case("rewards/margins", f"{MORE_STEPS}, loss 2 …", f"{STOPPING} {BETWEEN}"),
    ],
    "train.early_stopping.patience": [
        Case("2", f"{MORE_STEPS}, loss 2, weights 2", CONSTANT),
        Case("null", f"{STOPPED}, loss 2, weights 2", CONSTANT),
    ],
    "train.early_stopping.min_delta": [Case("9", f"{STOPPED}, loss 2 …", STOPPING)],
    "train.sample_prompts": [Case("[Hello]", "samples, files")],
    "train.sample_tokens": [Case("3", "samples", "train.sample_prompts=[Hello]")],
    "train.save_every": [Case("1", "checkpoints", "train.keep_checkpoints=9")],
    "train.save_minutes": [
        Case("1e-9", "checkpoints", "train.keep_checkpoints=9", where="quick saves"),
        Case(
            "null",
            "checkpoints",
            "train.keep_checkpoints=9 train.save_minutes=1e-9",
            where="quick saves",
        ),
    ],
    "train.keep_checkpoints": [Case("1", "checkpoints", "train.save_every=1")],
    "train.resume": [Case("never", "rejected:holds a run", "train.resume=auto", where="finished")],
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
        Case(
            "mlx",
            "rejected:logps.impl is mlx, but train.engine=reference",
            "train.engine=reference",
        ),
    ],
    "engine.attention": [
        Case("mlx", "engine, fused attention", "engine.attention=blocks"),
        Case("auto", "engine", "engine.attention=blocks"),
    ],
    "engine.calibration": [
        Case("off", "engine, micro-batches, positions, evaluated batches", where="measured")
    ],
    "memory.limit_gb": [
        Case("1", "limits"),
        Case("1e-4", "rejected:memory", "train.memory_check=error"),
    ],
    "memory.cache_limit_gb": [Case("0", "limits")],
    "memory.wired_limit_gb": [
        Case("1", "limits", where="metal"),
        Case("1", "rejected:memory.wired_limit_gb is 1, but only Metal"),
    ],
    "data.train[].path": [Case(train(path="@/other.jsonl"), f"{PAIRS}, loss 1 …", PATH)],
    "data.train[].name": [Case(train(path="@/pairs.jsonl", name="a"), "sources", PATH)],
    "data.train[].split": [
        Case(
            train(path="@/splits", split="test"),
            f"{PAIRS}, loss 1 …",
            f"data.train={train(path='@/splits', split='train')}",
        )
    ],
    "data.train[].subset": [
        Case(
            train(path="a/b", subset="other"),
            f"{PAIRS}, loss 1 …",
            f"data.train={train(path='a/b')}",
            where="hub",
        )
    ],
    "data.train[].columns": [
        Case(
            train(path="@/questions.jsonl", columns={"prompt": "q2"}),
            "tokens, micro-batches, positions, loss 1 …",
            f"data.train={train(path='@/questions.jsonl', columns={'prompt': 'q'})}",
        )
    ],
    "data.train[].max_samples": [
        Case(train(path="@/pairs.jsonl", max_samples=6), f"{SHARE}, loss 1 …", PATH)
    ],
    "data.train[].weight": [
        Case(
            weighted(3),
            "order, sources, micro-batches, positions, loss 1 …",
            f"data.train={weighted(1)}",
        )
    ],
    "data.valid[].path": [
        Case(valid(path="@/other.jsonl"), f"{VALID}, validation tokens", VALID_PATH)
    ],
    "data.valid[].name": [
        Case(
            valid(path="@/valid.jsonl", name="a"),
            "rejected:data.valid.chat.name is 'a'",
            VALID_PATH,
        )
    ],
    "data.valid[].split": [
        Case(
            valid(path="@/splits", split="test"),
            f"{VALID}, validation tokens",
            f"data.valid={valid(path='@/splits', split='valid')}",
        )
    ],
    "data.valid[].subset": [
        Case(
            valid(path="a/b", subset="other"),
            f"{VALID}, validation tokens, warnings",
            f"data.valid={valid(path='a/b')}",
            where="hub",
        )
    ],
    "data.valid[].columns": [
        Case(
            valid(path="@/questions.jsonl", columns={"prompt": "q2"}),
            "validation tokens, warnings, evaluation before, result, evaluation after",
            f"data.valid={valid(path='@/questions.jsonl', columns={'prompt': 'q'})}",
        )
    ],
    "data.valid[].max_samples": [
        Case(valid(path="@/valid.jsonl", max_samples=2), VALID, VALID_PATH)
    ],
    "data.valid[].weight": [
        Case(valid(path="@/valid.jsonl", weight=2), "rejected:data.valid.chat.weight", VALID_PATH)
    ],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """On the CPU: a GPU has other micro-batches, and rounds otherwise."""
    root = tmp_path_factory.mktemp("settings")
    write_files(root)
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    yield Lab(root)
    mx.set_default_device(device)


SOURCE_SETTINGS = {
    f"{name}[].{item}": hint
    for name in ("data.train", "data.valid")
    for item, _, hint in all_settings(SourceConfig)
}
ALL = {name: hint for name, (_, hint) in SETTINGS.items()} | SOURCE_SETTINGS


ROUNDED = (*NUMBERS, "evaluation before", "result")


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
    _, is_rejected, message = case.differs.partition("rejected:")
    if is_rejected:
        assert message.replace("@", str(lab.root)) in other.get("rejected", "")
        return
    assert "rejected" not in other, other["rejected"]
    expected, actual = case.aspects(), differences(base, other)
    if "rounding" in expected:  # which may be small
        actual = ["rounding", *(aspect for aspect in actual if aspect not in ROUNDED)]
    also = [aspect for aspect in actual if aspect not in expected]
    neither = [aspect for aspect in expected if aspect not in actual]
    assert not also + neither, f"{also} differ, too, and {neither} are the same"
    # What may change when a run goes on must not change its training by a single bit.
    if name in SETTINGS and SETTINGS[name][0].metadata["on_resume"] == "free":
        assert differences(base, other, 0.0) == actual
