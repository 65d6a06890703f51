"""Log-probabilities from rows of logits, and their gradient: a GPU kernel and MLX operations."""
