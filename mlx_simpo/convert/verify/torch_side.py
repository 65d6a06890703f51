"""The other side of a comparison: transformers and PEFT on torch, where they are installed."""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

from ...errors import SimPOError
from ...files import read_header
from ...model.adapters import PEFT_WEIGHTS
from .compare import Logits


def torch_reason() -> str | None:
    """Why torch's side cannot be run here; None if it can."""
    missing = [n for n in ("torch", "transformers", "peft") if not importlib.util.find_spec(n)]
    return f"{' and '.join(missing)} not installed" if missing else None


def torch_logits(folder: Path, tokens: list[list[int]], adapter: Path | None = None) -> Logits:
    """The logits of transformers' model, with an adapter by PEFT, in float32 on the CPU.

    Raises:
        SimPOError: transformers or PEFT finds tensors missing, left over or of another shape.
    """
    import torch  # type: ignore[import-not-found]
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = auto_class(folder).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(map(str, info[kind]))
            raise SimPOError(f"transformers: {len(names)} {kind} in {folder}, e.g. {names[0]}")
    if adapter is not None:
        model = with_peft(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.float().numpy()


def auto_class(folder: Path) -> Any:
    """transformers' class for a folder: of a model that sees, the whole of it (the class for text
    knows only the text part of some, and others not at all)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING,
    )

    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    return AutoModelForImageTextToText if kind in SEEING else AutoModelForCausalLM


def with_peft(model: Any, adapter: Path) -> Any:
    """The model with a PEFT adapter; SimPOError for tensors that PEFT leaves out or does not find,
    of which it warns at most."""
    from peft import PeftModel, get_peft_model_state_dict  # type: ignore[import-not-found]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they may say is looked at below
        wrapped = PeftModel.from_pretrained(model, str(adapter))
    there = set(get_peft_model_state_dict(wrapped))
    given = set(read_header(adapter / PEFT_WEIGHTS).shapes)
    fused = not any(re.search(r"\.experts\.\d+\.", name) for name in given)
    if fused and there != given:  # single experts are joined on the way in
        raise SimPOError(
            f"PEFT: {len(there ^ given)} tensors do not fit, e.g. {min(there ^ given)}"
        )
    return wrapped
