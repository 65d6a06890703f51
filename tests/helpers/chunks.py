"""The chunks that the head is computed in, recorded while an engine runs."""

from typing import Any

import mlx.core as mx
import pytest

from mlx_simpo.engine import shared_prefix, token_logps


def recorded_bounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bounds on a chunk's logits that the shared-prefix engine passes on, from now on."""
    bounds: list[int] = []
    original = shared_prefix.token_logps

    def recording(*args: Any, chunk_logits: int, **options: Any) -> mx.array:
        bounds.append(chunk_logits)
        return original(*args, chunk_logits=chunk_logits, **options)

    monkeypatch.setattr(shared_prefix, "token_logps", recording)
    return bounds


def recorded_sizes(smallest: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the chunks from now on, of which the smallest may have ``smallest``."""
    sizes: list[int] = []
    original = token_logps.chunk_rows

    def recording(*args: int) -> int:
        sizes.append(original(*args))
        return sizes[-1]

    monkeypatch.setattr(token_logps, "MIN_CHUNK_ROWS", smallest)
    monkeypatch.setattr(token_logps, "chunk_rows", recording)
    return sizes
