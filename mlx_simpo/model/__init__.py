"""The model: loading it, attaching LoRA, saving and loading adapters."""
