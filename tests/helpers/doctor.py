"""An example for `doctor` that takes no time."""

from helpers.tiny import tiny_model, token_pair

from mlx_simpo.doctor import examples
from mlx_simpo.doctor.examples import Example


def tiny_example(**changes: object) -> Example:
    """Two pairs, and a llama of two layers with LoRA."""
    pairs = [token_pair(9, 5, 3), token_pair(4, 3, 8, seed=1)]
    return examples._example("tiny", "llama", tiny_model(), pairs)._replace(**changes)
