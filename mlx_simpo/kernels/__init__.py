"""log p(target) of rows of logits and its gradient, as a GPU kernel or in MLX operations."""
