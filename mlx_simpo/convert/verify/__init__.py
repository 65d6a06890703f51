"""The proof that a conversion changed nothing."""
