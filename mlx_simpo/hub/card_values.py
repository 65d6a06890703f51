"""What a folder's record says about its training: the variables of card.md.jinja.

A record may come from another version of this package, or from somebody else: any part of it may be
missing or of another type. What is not there is None or empty; no default takes its place.
"""

import json
import math
import shlex
from typing import Any

from ..config.sections import LoRAConfig
from ..reporting.display import EVALUATION_ROWS, count_text, metric_text
from ..version import __version__
from .card_datasets import datasets
from .folders import RUN, Folder, as_text, lookup
from .markdown import code, format_value, is_number, table

PLACEHOLDER = "path/to/base-model"  # where the base model has no name on the Hub
_PROMPT = "How do I boil an egg?"
# The settings that the card shows.
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


def card_values(folder: Folder, repo: str, revision: str | None) -> dict[str, Any]:
    """Return the variables of card.md.jinja, all but the mark.

    Args:
        repo: the repository that the card is for, owner/name. revision: its branch; None: main.
    """
    base = folder.public_name(folder.base)
    base_id = base.text if base and base.on_hub else PLACEHOLDER
    trained_on = folder.trained_on if folder.trained_on != folder.base else None
    template = as_text(lookup(folder.settings, "data.chat_template")) or "auto"
    columns, results = evaluations(folder)
    return {
        # Functions: text as code, a table, and text as a literal of Python and of the shell.
        "code": code,
        "table": table,
        "json": json.dumps,
        "shell": shlex.quote,
        # The folder and its base model.
        "repo": repo,
        "revision": revision,
        "name": repo.rpartition("/")[2],
        "kind": folder.kind,
        "base": base,
        "base_revision": folder.revision,
        "trained_on": folder.public_name(trained_on),
        "bits": number_or_none(lookup(folder.record, "base.quantization.bits")),
        "group_size": number_or_none(lookup(folder.record, "base.quantization.group_size")),
        # The training.
        "has_settings": bool(folder.settings),
        "interrupted": lookup(folder.summary, "interrupted") is True,
        "datasets": datasets(folder),
        "pairs": number_or_none(lookup(folder.summary, "pairs")),
        "valid_fraction": valid_fraction(folder),
        "settings": settings_rows(folder),
        "result_columns": columns,
        "results": results,
        # How to load it.
        "base_id": base_id,
        "base_arguments": arguments(base_id, folder.revision if base_id != PLACEHOLDER else None),
        "repo_arguments": arguments(repo, revision),
        "auto_class": auto_class(folder),
        "has_tokenizer": (folder.path / "tokenizer_config.json").is_file(),
        "template": template,
        "has_own_template": template not in ("auto", "none"),
        "prompt": _PROMPT,
        # Versions of this package.
        "version": __version__,
        "record_version": as_text(lookup(folder.record, "version")),
    }


def number_or_none(value: Any) -> int | float | None:
    """Return a value if it is a finite number."""
    return value if is_number(value) else None


def valid_fraction(folder: Folder) -> float | None:
    """Return the share of the prompts that was held out, if these are the evaluation pairs."""
    data = lookup(folder.settings, "data")
    fraction = number_or_none(lookup(data, "valid_fraction"))
    if not lookup(data, "train") or lookup(data, "valid") is not None:
        return None
    return fraction if fraction and fraction > 0 else None


def settings_rows(folder: Folder) -> list[tuple[str, str]]:
    """Return the settings that the record holds, and what follows from them, as cells."""
    values = [(f"`{name}`", lookup(folder.settings, name)) for name in _SETTINGS]
    rows = [(name, format_value(value)) for name, value in values if value is not None]
    beta, ratio = (lookup(folder.settings, f"objective.{n}") for n in ("beta", "gamma_beta_ratio"))
    if is_number(beta) and is_number(ratio):
        rows.append(("target margin γ (beta × gamma_beta_ratio)", format_value(beta * ratio)))
    names = ("train.batch_size", "train.gradient_accumulation_steps")
    sizes = [lookup(folder.settings, name) for name in names]
    if all(map(is_number, sizes)):
        rows.append(("pairs per optimizer step", f"{sizes[0]} × {sizes[1]} = {math.prod(sizes)}"))
    if (scale := lora_scale(folder)) is not None:
        rows.append(("scale of the LoRA delta", format_value(scale)))
    steps, epochs = (lookup(folder.summary, name) for name in ("steps", "train.epoch"))
    if is_number(steps):
        rows.append(("optimizer steps done", format_value(steps)))
    if is_number(epochs):
        rows.append(("epochs done", f"{epochs:.4g}"))
    if start := folder.public_name(lookup(folder.settings, "lora.init_from")):
        rows.append(("adapter it started from", code(start.text)))
    if template := as_text(lookup(folder.record, "template_sha256")):
        rows.append(("SHA-256 of the chat template", code(template)))
    return rows


def lora_scale(folder: Folder) -> float | None:
    """Return the scale of the LoRA delta: the adapter's own, or the one that its settings give."""
    if folder.kind is RUN:
        return number_or_none(lookup(folder.config, "lora_parameters.scale"))
    lora = lookup(folder.settings, "lora")
    names = ("rank", "lora_alpha", "scale", "rslora")
    if not isinstance(lora, dict) or any(name not in lora for name in names):
        return None
    rank, *scales = (lora[name] for name in names[:3])
    if not is_number(rank) or not all(s is None or is_number(s) for s in scales):
        return None
    if not isinstance(lora["rslora"], bool):
        return None
    return LoRAConfig(**{name: lora[name] for name in names}).resolved_scale


def evaluations(folder: Folder) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return (headings, rows of cells) of the evaluations before and after the training."""
    both = {name: lookup(folder.summary, name) for name in ("before", "after")}
    sets = lookup(folder.summary, "valid_sets")
    if isinstance(sets, dict) and sets:
        both = {f"{code(str(n))}, {w}": lookup(sets[n], w) for n in sets for w in both}
    columns = {name: values for name, values in both.items() if isinstance(values, dict)}
    rows: list[tuple[str, ...]] = []
    for name in EVALUATION_ROWS:
        values = [lookup(column, name) for column in columns.values()]
        if any(map(is_number, values)):
            cells = [metric_text(name, v) if is_number(v) else "" for v in values]
            rows.append((f"`{name}`", *cells))
        intervals = [interval_text(lookup(c, f"{name}_interval")) for c in columns.values()]
        if any(intervals):
            rows.append(("95 % bootstrap interval of it", *intervals))
    counts = {name: lookup(column, "pairs") for name, column in columns.items()}
    headings = [f"{n} ({count_text(c, 'pair')})" if is_number(c) else n for n, c in counts.items()]
    return ["metric", *headings], rows


def interval_text(bounds: Any) -> str:
    """Return an interval of shares in words; "" for anything else."""
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(map(is_number, bounds)):
        return ""
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}"


def auto_class(folder: Folder) -> str:
    """Return transformers' class for a model, or for the base model of a PEFT adapter.

    A model that takes images holds its text model within it, where AutoModelForCausalLM would not
    look for it.
    """
    targets = folder.config.get("target_modules")
    is_inner = isinstance(targets, list) and any("language_model." in str(t) for t in targets)
    takes_images = is_inner or isinstance(folder.config.get("vision_config"), dict)
    return "AutoModelForImageTextToText" if takes_images else "AutoModelForCausalLM"


def arguments(name: str, revision: str | None) -> str:
    """Return a Hub id and its revision as arguments in Python."""
    return json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")
