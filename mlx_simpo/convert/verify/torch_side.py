"""Logits of transformers and PEFT in torch, where these are installed."""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

from ...errors import SimPOError
from ...files import read_header
from ...model.adapters import PEFT_WEIGHTS
from .compare import Logits


def missing_packages() -> str | None:
    """Say which packages are missing to compare with torch; None if none is."""
    missing = [n for n in ("torch", "transformers", "peft") if not importlib.util.find_spec(n)]
    verb = "are" if len(missing) > 1 else "is"
    return f"{' and '.join(missing)} {verb} not installed" if missing else None


def torch_logits(folder: Path, tokens: list[list[int]], adapter: Path | None = None) -> Logits:
    """Run transformers' model in float32 on the CPU.

    Args:
        folder: of the model.
        tokens: (texts, tokens).
        adapter: folder of a PEFT adapter; None for the model alone.

    Returns:
        (texts, tokens, vocabulary), float32.

    Raises:
        SimPOError: tensors are missing, unexpected or of another shape.
    """
    import torch  # type: ignore[import-not-found]
    from transformers.utils import logging

    logging.disable_progress_bar()  # stdout and stderr are the command's own
    model, info = auto_class(folder).from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,  # never a pickle that lies beside them
    )
    # transformers only warns about these.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(map(str, info[kind]))
            raise SimPOError(f"transformers: {len(names)} {kind} in {folder}, e.g. {names[0]}")
    if adapter is not None:
        model = with_peft(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.float().numpy()


def auto_class(folder: Path) -> Any:
    """Return transformers' class for the model in a folder.

    For a vision-language model this is the class of the whole model: the class for text knows only
    the text part of some, and others not at all.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISION_LANGUAGE,
    )

    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    return AutoModelForImageTextToText if kind in VISION_LANGUAGE else AutoModelForCausalLM


def with_peft(model: Any, adapter: Path) -> Any:
    """Return the model with a PEFT adapter attached.

    Raises:
        SimPOError: PEFT ignored tensors of the file or did not find some that it needs.
    """
    from peft import PeftModel, get_peft_model_state_dict  # type: ignore[import-not-found]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they warn of is an error below
        wrapped = PeftModel.from_pretrained(model, str(adapter))
    loaded = set(get_peft_model_state_dict(wrapped))
    in_file = set(read_header(adapter / PEFT_WEIGHTS).shapes)
    # PEFT joins single experts as it loads them, under other names.
    has_single_experts = any(re.search(r"\.experts\.\d+\.", name) for name in in_file)
    if not has_single_experts and loaded != in_file:
        differing = loaded ^ in_file
        raise SimPOError(f"PEFT: {len(differing)} tensors do not fit, e.g. {min(differing)}")
    return wrapped
