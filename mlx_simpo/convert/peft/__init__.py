"""PEFT adapters: their configuration, reading and writing."""
