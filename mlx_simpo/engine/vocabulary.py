"""Which token ids a model has, and the check that all of a text's are among them.

MLX does not check indices: for an id beyond the embedding it reads whatever follows in memory, and
the loss is a number all the same.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..data.encode import EncodedPair
from ..data.tokens import largest_token_ids
from ..errors import SimPOError

_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
# Names of the tables in mlx-lm's models that are indexed by token ids. Others are indexed by
# positions (wpe) or hashes (n-grams), and may have more rows or fewer. A table with LoRA is the
# part "embedding" of its layer.
_TOKEN_TABLES = {
    "embed",
    "embed_in",
    "embed_tokens",
    "embed_tokens_per_layer",
    "embedding",
    "embeddings",
    "tok_embeddings",
    "token_embeddings",
    "word_embeddings",
    "wte",
}


def vocabulary_size(model: Any) -> int:
    """Return how many token ids the model can both read and predict; they count from 0.

    It is the width of the logits, or the rows of a token embedding that has fewer.
    """
    rows = [
        len(module["weight"])
        for path, module in model.named_modules()
        if isinstance(module, _EMBEDDING) and path.rpartition(".")[2] in _TOKEN_TABLES
    ]
    width = model(mx.zeros((1, 1), mx.int32)).shape[-1]  # its shape is known without computing it
    return min([width, *rows])


def check_token_ids(pairs: Sequence[EncodedPair], model: Any, name: str = "the model") -> None:
    """Check that every token of the pairs is in the model's vocabulary.

    Args:
        name: of the model, for the message.

    Raises:
        SimPOError: a token is not: the pairs were encoded with another model's tokenizer.
    """
    size = vocabulary_size(model)
    outside = np.flatnonzero(largest_token_ids(pairs) >= size)
    if not len(outside):
        return
    first = pairs[int(outside[0])]
    tokens = np.concatenate([first.chosen.tokens, first.rejected.tokens])
    more = f" (and {len(outside) - 1:,} more pairs)" if len(outside) > 1 else ""
    where = f"{first.source or f'pair {outside[0]}'}{more}"
    raise _outside_vocabulary(where, tokens, size, name)


def check_prompt_ids(tokens: Sequence[int], model: Any, name: str = "the model") -> None:
    """Check that every token of a prompt is in the model's vocabulary.

    Raises:
        SimPOError: a token is not: the tokenizer is another model's.
    """
    size = vocabulary_size(model)
    if any(not 0 <= token < size for token in tokens):
        raise _outside_vocabulary("the prompt", np.array(tokens), size, name)


def _outside_vocabulary(where: str, tokens: np.ndarray, size: int, name: str) -> SimPOError:
    token = tokens[(tokens < 0) | (tokens >= size)][0]
    return SimPOError(
        f"{where} has token {token}, but {name} has a vocabulary of {size} (0 to {size - 1}): the "
        "tokenizer belongs to another model; use the tokenizer that the model came with"
    )
