"""To Hugging Face and back: adapters, whole models, and the proof that nothing was lost."""

from .adapters import Conversion, from_peft, to_peft
from .from_hf import from_hf
from .fuse import fuse

__all__ = ["Conversion", "from_hf", "from_peft", "fuse", "to_peft"]
