"""How a setting of another tool becomes ours: renamed, computed, or omitted (`aliases` has them).

A rule takes the value and the other settings, in any tool's spelling, because some values depend on
others: an absolute gamma is divided by beta, iterations are counted in micro-batches.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from ..errors import SimPOError
from ..paths import local_path


class Here(NamedTuple):
    """What a setting of another tool is here.

    settings: our names and their values; none if there is nothing to set.
    is_same: whether that means exactly the same.
    note: what a user has to know about it, or an empty string.
    """

    settings: Mapping[str, Any]
    is_same: bool
    note: str = ""


# What else is set, by the names of any tool.
Others = Mapping[str, Any]
# A flag without a value is True.
Rule = Callable[[Any, Others], Here]
MODEL = ("model_name_or_path", "base_model", "model_name", "model_id")


# --- names -----------------------------------------------------------------------------------


def same(name: str, note: str = "", **values: Any) -> Rule:
    """Return the rule of another name for a setting; ``values``: other values, in lower case."""

    def rule(value: Any, others: Others) -> Here:
        return Here({name: values.get(str(value).lower(), value)}, True, note)

    return rule


def omit(note: str, *harmless: Any) -> Rule:
    """Return the rule of what does not exist here; ``harmless`` values ask for what happens."""
    return lambda value, others: Here({}, value in harmless, note)


def objective(*names: str) -> Rule:
    """Return the rule of a setting that selects the objective: simpo, or one of ``names``."""
    return omit("SimPO is what is trained here", "simpo", *names)


def method(value: Any, others: Others) -> Here:
    """Translate the way of fine-tuning: lora, dora or full."""
    if value == "dora":
        return Here({"lora.dora": True}, True)
    return Here({}, value in ("lora", "qlora"), "LoRA is what is trained here")


def adapter(value: Any, others: Others) -> Here:
    """Translate ``adapter``: axolotl's way of fine-tuning, or a folder to start from."""
    if value in ("lora", "qlora"):
        return method(value, others)
    return Here({"lora.init_from": value}, True)


def train(value: Any, others: Others) -> Here:
    """Translate mlx_lm's flag, which is a setting here if it has a value."""
    if isinstance(value, bool):
        return Here({}, value, "it is what the command does")
    return Here({"data.train": value}, True)


def loss(value: Any, others: Others) -> Here:
    """Translate the loss, which TRL calls simpo."""
    if value in ("sigmoid", "hinge"):
        return Here({"objective.loss_type": value}, True)
    return objective()(value, others)


def schedule(value: Any, others: Others) -> Here:
    """Translate the learning rate's schedule; transformers' constant one has no warm-up."""
    name = value.get("name") if isinstance(value, Mapping) else value
    names = {"cosine_decay": "cosine", "linear_schedule": "linear"}
    name = names.get(str(name), name)
    if name in ("cosine", "linear"):
        return Here({"train.schedule": name}, not isinstance(value, Mapping))
    if name == "constant_with_warmup":
        return Here({"train.schedule": "constant"}, True)
    if name == "constant":
        return Here({"train.schedule": "constant", "train.warmup_ratio": 0}, True)
    return Here({"train.schedule": "cosine"}, False, "cosine, linear or constant, after a warm-up")


def clipping(value: Any, others: Others) -> Here:
    """Translate the norm that gradients are clipped to, which is 0 elsewhere if they are not."""
    return Here({"train.max_grad_norm": None if value == 0 else value}, True)


def modules(value: Any, others: Others) -> Here:
    """Translate the modules to adapt: all of them, or a list, which may be text with commas."""
    if value in ("all", "all-linear", ["all"], ["all-linear"], True):
        value = "all-linear"
    elif isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    return Here({"lora.target_modules": value}, True)


def lora_parameters(value: Any, others: Others) -> Here:
    """Translate mlx_lm's section of LoRA settings."""
    names = {"keys": "target_modules", "alpha": "lora_alpha"}
    values = value if isinstance(value, Mapping) else {"rank": 16}
    settings = {f"lora.{names.get(name, name)}": v for name, v in values.items()}
    return Here(settings, False, "settings of the section lora")


# --- values that are computed ----------------------------------------------------------------


def gamma(value: Any, others: Others) -> Here:
    """Divide an absolute target margin by beta."""
    beta = _first(others, "objective.beta", "beta", "pref_beta", "rl_beta", "simpo_beta")
    margin, divisor = _number(value), beta or 2.0
    ratio = 0.5 if margin is None else _rounded(margin / divisor)
    note = f"here the target margin is divided by beta, {_rounded(divisor)}"
    return Here({"objective.gamma_beta_ratio": ratio}, False, note)


def sft_weight(value: Any, others: Others) -> Here:
    """Translate the weight of an SFT term; 0 is the same everywhere."""
    note = "here it weighs the mean cross-entropy per token of the chosen responses"
    return Here({"objective.sft_weight": value}, value == 0, "" if value == 0 else note)


def length(value: Any, others: Others) -> Here:
    """Translate the length of a whole sequence, beside which a prompt's has to fit."""
    total = int(_number(value) or 1024)
    settings = {"data.max_length": total}
    prompt = _first(others, "data.max_prompt_length", "max_prompt_length")
    if (prompt or 512) >= total:  # 512: the default
        settings["data.max_prompt_length"] = max(1, total // 2)
    note = "prompt and response together; the prompt is cut first, to data.max_prompt_length"
    return Here(settings, False, note)


def completion_length(value: Any, others: Others) -> Here:
    """Translate the length of a response, to which the prompt's is added."""
    prompt = int(_first(others, "data.max_prompt_length", "max_prompt_length") or 512)
    note = f"prompt ({prompt}) and response together"
    return Here({"data.max_length": prompt + int(_number(value) or 512)}, False, note)


def steps(value: Any, others: Others) -> Here:
    """Translate transformers' number of steps, which is -1 if the epochs count."""
    if value == -1:
        return Here({}, False, "without it train.epochs sets the length")
    return Here({"train.steps": value}, True)


def iterations(value: Any, others: Others) -> Here:
    """Translate mlx_lm's iterations, each of which is one micro-batch."""
    per_step = _first(others, "grad_accumulation_steps", "train.gradient_accumulation_steps")
    number = _number(value)
    if number and per_step and per_step > 1:
        note = f"here a step is an update, after {per_step:.0f} micro-batches"
        return Here({"train.steps": math.ceil(number / per_step)}, False, note)
    note = "steps of train.batch_size × train.gradient_accumulation_steps pairs"
    return Here({"train.steps": value}, True, note)


def every(name: str) -> Rule:
    """Return the rule of a number of steps, which for transformers may be a fraction of all."""

    def rule(value: Any, others: Others) -> Here:
        number = _number(value)
        if number is None or number >= 1:
            return Here({name: value}, True)
        total = _first(others, "train.steps", "steps", "max_steps", "iters") or 1000
        return Here({name: max(1, round(number * total))}, False, f"steps, of {total:.0f}")

    return rule


def per_epoch(name: str) -> Rule:
    """Return the rule of a number per epoch; an epoch's steps are not known yet."""
    return lambda value, others: Here({name: 100}, False, "a number of steps, for example 100")


def warmup(value: Any, others: Others) -> Here:
    """Divide the steps of the warm-up by all steps; below 1 they are a fraction already."""
    number = _number(value)
    total = _first(others, "train.steps", "steps", "max_steps", "iters")
    if number is not None and number < 1:
        return Here({"train.warmup_ratio": value}, True)
    if number is None or not total or number >= total:
        return Here({"train.warmup_ratio": 0.1}, False, "a fraction of the steps, for example 0.1")
    note = f"a fraction of the {total:.0f} steps"
    return Here({"train.warmup_ratio": _rounded(number / total)}, False, note)


def held_out(value: Any, others: Others) -> Here:
    """Translate the validation pairs that are held out: a fraction, or a number of them."""
    number = _number(value)
    if number is None or number < 1:
        return Here({"data.valid_fraction": value}, True)
    return Here({"data.valid_fraction": 0.05}, False, "a fraction of the prompts, for example 0.05")


def valid_batches(value: Any, others: Others) -> Here:
    """Translate a number of validation batches, -1 for all, to pairs."""
    number, size = _number(value), _first(others, "train.batch_size", "batch_size") or 4
    if number is None or number < 1:
        return Here({"data.valid_max": None}, False, "null: all pairs")
    return Here({"data.valid_max": int(number * size)}, False, f"pairs, {size:.0f} per batch")


# --- data and models -------------------------------------------------------------------------


def data(value: Any, others: Others) -> Here:
    """Translate mlx_lm's data: a folder of training and validation pairs, or a dataset."""
    name = "data.folder" if is_data_folder(value) else "data.train"
    return Here({name: value}, True)


def is_data_folder(path: Any) -> bool:
    """Return whether a folder has a file of training pairs and one of validation pairs."""
    try:
        names = [file.stem for file in local_path(str(path)).iterdir() if file.is_file()]
    except (OSError, SimPOError):
        return False
    return {"train", "valid"} <= {name.partition(".")[0] for name in names}


def test_split(value: Any, others: Others) -> Here:
    """Translate the split of the validation pairs, which are named beside it here."""
    names = ("data.valid", "eval_dataset", "data.train", "dataset_name", "dataset")
    settings = {"data.valid": _first_text(others, *names) or "DATASET", "data.valid_split": value}
    return Here(settings, False, "data.valid names the dataset of the split")


def mixture(value: Any, others: Others) -> Here:
    """Translate datasets with their fractions, or a list of them, to a list of their names."""
    listed = list(value) if isinstance(value, Mapping | list) else [value]
    names = [item.get("path") if isinstance(item, Mapping) else item for item in listed]
    note = "or a list of {path: …, split: …, weight: …}"
    return Here({"data.train": names[0] if len(names) == 1 else names}, False, note)


def adapter_file(value: Any, others: Others) -> Here:
    """Translate the file of an adapter's weights to its folder."""
    is_file = str(value).endswith(".safetensors")
    folder = str(PurePath(str(value)).parent) if is_file else value
    return Here({"lora.init_from": folder}, False, "the adapter's folder")


def quantized(value: Any, others: Others) -> Here:
    """Say how a quantized model is trained; False asks for nothing."""
    model = _first_text(others, "model", *MODEL) or "MODEL"
    command = f"mlx-simpo convert from-hf {model} OUT --quantize 4"
    note = f"a quantized model is trained as it is: name one, or make one with `{command}`"
    return Here({}, value is False, note)


# --- helpers ---------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """Return a number that formulas can use, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _first(others: Others, *names: str) -> float | None:
    """Return the first of these settings that is a number other than 0."""
    return next((n for name in names if (n := _number(others.get(name)))), None)


def _first_text(others: Others, *names: str) -> str | None:
    """Return the first of these settings that is text."""
    return next((v for name in names if isinstance(v := others.get(name), str)), None)


def _rounded(value: float) -> float | int:
    """Return a number with six digits at most; a whole one as an int."""
    value = float(f"{value:.6g}")
    return int(value) if value.is_integer() else value
