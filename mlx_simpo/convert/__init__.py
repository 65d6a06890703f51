"""Conversion of adapters and whole models between MLX and Hugging Face, each checked by logits.

Arguments that `to_peft`, `from_peft`, `fuse` and `from_hf` share:
    output: a new folder; it appears complete, after all checks, or not at all.
    model: Hub id or folder of the base model. revision: branch, tag or commit of a Hub model.
    dtype: of the tensors that are written ("float32", "bfloat16" or "float16"); None leaves it as
        it is.
    verify: compare the logits of both sides; None does so where the model fits into memory.
    trust_remote_code: run code that comes with the model, and copy it with the model.
    display: where notes and warnings go; None for stderr.
"""

from .adapters import Conversion, from_peft, to_peft
from .from_hf import from_hf
from .fuse import fuse

__all__ = ["Conversion", "from_hf", "from_peft", "fuse", "to_peft"]
