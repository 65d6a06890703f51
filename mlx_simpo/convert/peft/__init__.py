"""PEFT adapters: configuration, reading, writing."""
