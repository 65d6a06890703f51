"""To the Hugging Face Hub: what of a folder goes, with which card."""

from .push import Push, push

__all__ = ["Push", "push"]
