"""What a folder's record says of its training, as Markdown: data, settings, results.

What the record does not hold is left out; no default takes its place.
"""

import math
from typing import Any

from ..config.sections import LoRAConfig
from ..reporting.display import EVALUATION_ROWS, metric_text
from .folders import RUN, Folder, at, text_or_none
from .markdown import code, number, shown, table

# What the table shows of the settings as they stand; what is not in the record is left out.
_SETTINGS = (
    "objective.beta",
    "objective.gamma_beta_ratio",
    "objective.loss_type",
    "objective.label_smoothing",
    "objective.sft_weight",
    "train.learning_rate",
    "train.schedule",
    "train.warmup_ratio",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.batch_size",
    "train.gradient_accumulation_steps",
    "train.epochs",
    "train.steps",
    "lora.rank",
    "lora.lora_alpha",
    "lora.dropout",
    "lora.rslora",
    "lora.dora",
    "lora.target_modules",
    "lora.num_layers",
    "data.max_length",
    "data.max_prompt_length",
    "data.compat",
    "dtype",
    "seed",
)


def data_lines(folder: Folder) -> str:
    """What was trained and evaluated on, as a list."""
    data = at(folder.settings, "data")
    lines = []
    for title, name, split in (("Pairs", "train", "train_split"), ("Evaluation", "valid", "")):
        found = folder.public(at(data, name))
        if found is None:
            continue
        url = f"https://huggingface.co/datasets/{found.text}"
        text = f"[{found.text}]({url})" if found.on_hub else f"{code(found.text)} (a local file)"
        for word, key in (("subset", "subset"), ("split", split or "valid_split")):
            value = text_or_none(at(data, key))
            # A subset is that of Hub data alone.
            if value and (found.on_hub or word == "split"):
                text += f", {word} {code(value)}"
        lines.append(f"- {title}: {text}")
    pairs, share = at(folder.summary, "pairs"), at(data, "valid_fraction")
    if number(pairs):
        lines.append(f"- Pairs trained on: {pairs:,}")
    if at(data, "train") and at(data, "valid") is None and number(share) and share > 0:
        lines.append(f"- Evaluation: {share:.4g} of the prompts, held out of the training")
    return "\n".join(lines)


def settings_table(folder: Folder) -> str:
    """The settings of the run that its record holds, and what follows from them."""
    rows = [(f"`{name}`", at(folder.settings, name)) for name in _SETTINGS]
    rows = [(name, shown(value)) for name, value in rows if value is not None]
    given = at(folder.settings, "objective") or {}
    beta, ratio = at(given, "beta"), at(given, "gamma_beta_ratio")
    if number(beta) and number(ratio):
        rows.append(("target margin γ (beta × gamma_beta_ratio)", shown(beta * ratio)))
    batch, accumulation = "train.batch_size", "train.gradient_accumulation_steps"
    sizes = [at(folder.settings, name) for name in (batch, accumulation)]
    if all(map(number, sizes)):
        rows.append(("pairs of an optimizer step", f"{sizes[0]} × {sizes[1]} = {math.prod(sizes)}"))
    scale = lora_scale(folder)
    if scale is not None:
        rows.append(("scale of the LoRA update", shown(scale)))
    steps, epochs = at(folder.summary, "steps"), at(folder.summary, "train.epoch")
    if number(steps):
        rows.append(("optimizer steps done", shown(steps)))
    if number(epochs):
        rows.append(("epochs done", f"{epochs:.4g}"))
    start = folder.public(at(folder.settings, "lora.init_from"))
    if start:
        rows.append(("adapter it started from", code(start.text)))
    template = text_or_none(at(folder.record, "template_sha256"))
    if template:
        rows.append(("SHA-256 of the chat template", code(template)))
    return table(("setting", "value"), rows) if rows else ""


def lora_scale(folder: Folder) -> float | None:
    """What the update is multiplied by: as the adapter has it, or as the settings give it."""
    if folder.kind is RUN:
        scale = at(folder.config, "lora_parameters.scale")
        return scale if number(scale) else None
    names = ("rank", "lora_alpha", "scale", "rslora")
    lora = {name: at(folder.settings, f"lora.{name}") for name in names}
    given = at(folder.settings, "lora") or {}
    whole = all(name in given for name in names) and isinstance(lora["rslora"], bool)
    sizes = [lora[name] for name in names[:3]]
    if not whole or not number(sizes[0]) or not all(v is None or number(v) for v in sizes[1:]):
        return None
    return LoRAConfig(**lora).resolved_scale


def results(folder: Folder) -> str:
    """Evaluations before and after, with sample sizes and the interval that the record has."""
    found = {name: at(folder.summary, name) for name in ("before", "after")}
    columns = {name: values for name, values in found.items() if isinstance(values, dict)}
    rows = []
    for name in EVALUATION_ROWS:
        values = [at(column, name) for column in columns.values()]
        if any(map(number, values)):
            cells = [metric_text(name, v) if number(v) else "" for v in values]
            rows.append((f"`{name}`", *cells))
        intervals = [interval(at(c, f"{name}_interval")) for c in columns.values()]
        if any(intervals):
            rows.append(("95 % bootstrap interval of it", *intervals))
    if not rows:
        return ""
    counts = [at(column, "pairs") for column in columns.values()]
    heads = [
        f"{name} ({count:,} pairs)" if number(count) else name
        for name, count in zip(columns, counts, strict=True)
    ]
    text = "On the validation pairs, before and after the training."
    if folder.kind is not RUN:
        text += " Measured with the adapter as it was trained, before these files were made of it."
    return f"{text}\n\n{table(('metric', *heads), rows)}"


def interval(bounds: Any) -> str:
    """An interval of shares in words; "" if it is none."""
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(map(number, bounds)):
        return ""
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}"
