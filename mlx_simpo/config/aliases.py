"""Hints for misspelt settings: names from other libraries, and the nearest name of ours."""

import difflib
from collections.abc import Sequence

# Names that TRL, PEFT, mlx-lm and the authors' code use for the same thing, or for something that
# is easily taken for it. SimPO's gamma is the trap: here it is divided by beta.
ALIASES = {
    "gamma": "objective.gamma_beta_ratio (the target margin divided by beta)",
    "simpo_gamma": "objective.gamma_beta_ratio (TRL's simpo_gamma divided by beta)",
    "cpo_alpha": "objective.sft_weight",
    "lr": "train.learning_rate",
    "alpha": "lora.lora_alpha",
    "r": "lora.rank",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "max_seq_length": "data.max_length",
    "iters": "train.steps",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "output_dir": "output",
    "adapter_path": "output",
}


def hint_at_name(path: str, names: Sequence[str]) -> str:
    """Return a hint such as ``; did you mean 'lora.rank'?``.

    Args:
        path: the unknown setting as the user wrote it, with or without its section.
        names: all settings, with their sections (``lora.rank``).
    """
    leaf = path.rpartition(".")[2]
    if leaf in ALIASES:
        return f"; did you mean {ALIASES[leaf]}?"
    same_words = [name for name in names if _words(name) == _words(path)]  # lora_rank
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    by_leaf = {name.rpartition(".")[2]: name for name in names}
    close = difflib.get_close_matches(leaf, by_leaf, n=1)
    candidates = (
        same_words
        or same_leaf
        or [by_leaf[c] for c in close]
        or difflib.get_close_matches(path, names, n=1)
    )
    if not candidates:
        return "; `mlx-simpo train --help` lists them all"
    return f"; did you mean {candidates[0]!r}?"


def hint_at_section(name: str, sections: Sequence[str]) -> str:
    """Return a hint at the section that ``name`` misspells, or an empty string."""
    close = difflib.get_close_matches(name.lower(), sections, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _words(name: str) -> list[str]:
    """Split a name into lower-case words at dots, hyphens and underscores."""
    return name.lower().replace("-", "_").replace(".", "_").split("_")
