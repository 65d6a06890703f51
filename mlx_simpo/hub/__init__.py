"""The Hugging Face Hub: which files of a folder are sent, and with which model card."""

from .push import Push, push

__all__ = ["Push", "push"]
