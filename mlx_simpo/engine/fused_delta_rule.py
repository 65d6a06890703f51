"""MLX's own gated delta rule, mx.fast.gated_delta_update: whether its gradient is fused on this
device, whether it is right, and what computes the rule in a model.

On Metal, MLX computes rule and gradient in kernels for a few numbers of heads. What they do not
take becomes a loop over tokens. So MLX itself is asked what it would run, and that is compared
with the recurrence before it is trusted. (A gate for each entry of the keys has a dimension more
than the gates that the kernels read, and only their result tells.)
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_ops

from ..device import is_gpu
from ..randomness import seeded
from .agreement import Agreement, Difference, dtype_name, relative_difference, summarize
from .delta_rule import CHUNK, chunked_delta_rule
from .fused_attention import TOLERANCES, primitive_count
from .operations import DeltaRule, Operations, patchable_modules, patched
from .prefix_cache import empty_caches
from .trunk import run_trunk

# The primitive of the fused gradient in MLX's graphs (mlx 0.32.4, mlx/fast_primitives.h).
FUSED_GRADIENT = "GatedDeltaUpdateVJP"
# Bytes of states that a fused gradient may take at a time: on chips before the M5, MLX's kernels
# store the state after each token while they run (2 MiB for 32 heads of size 128).
MAX_STATE_BYTES = 2**29
# Batch and tokens of the comparisons with the recurrence. The kernels take chunks of 8 or 16
# tokens, and one token after the other up to 8.
SHORT = ((2, 3), (2, 21))
# With the chunked form instead, as the recurrence would take gigabytes: kernels keep a state for
# every 256 tokens and compute the others again.
LONG = (1, 300)
OBSERVED_TOKENS = 3

_INPUTS = ("queries", "keys", "values", "decays", "rates", "the state")


class DeltaShape(NamedTuple):
    """What a model's layers compute the gated delta rule with.

    dtype: of queries, keys and values. vector_gates: whether each entry of the keys has a decay of
    its own.
    """

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    dtype: mx.Dtype
    vector_gates: bool

    @property
    def description(self) -> str:
        """The shape, for the user."""
        heads = dict.fromkeys((self.key_heads, self.value_heads))
        sizes = dict.fromkeys((self.key_size, self.value_size))
        gates = " with a decay for each entry" if self.vector_gates else ""
        return (
            f"{'/'.join(map(str, heads))} heads of size {'/'.join(map(str, sizes))}{gates} in "
            f"{dtype_name(self.dtype)}"
        )


def fused_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute the gated delta rule with MLX's own operation; see `operations.DeltaRule`.

    It is called for some tokens at a time, so that its gradient takes MAX_STATE_BYTES or less (or
    the states of CHUNK tokens).
    """
    step = max(CHUNK, MAX_STATE_BYTES // (state.size * 4) // CHUNK * CHUNK)
    borders = list(range(step, q.shape[1], step))
    outputs = []
    for part in zip(*(mx.split(a, borders, axis=1) for a in (q, k, v, g, beta)), strict=True):
        out, state = _update(*part, state)
        outputs.append(out)
    return mx.concatenate(outputs, axis=1) if borders else outputs[0], state


def _update(*inputs: mx.array) -> tuple[mx.array, mx.array]:
    # Its docstring promises another shape of the state than it takes and returns.
    out, state = mx.fast.gated_delta_update(*inputs)  # type: ignore[call-arg]
    return out, state


def has_fused_delta_gradient(shape: DeltaShape) -> bool:
    """Return whether MLX has a fused gradient for this shape on its default device."""
    return _graph_is_fused(shape, str(mx.default_device()))


@cache
def _graph_is_fused(shape: DeltaShape, device: str) -> bool:
    """Return whether the graph of a gradient, which is not evaluated, has the fused primitive."""
    inputs, cotangents = _samples(shape, *SHORT[-1])
    try:
        _, gradients = mx.vjp(fused_delta_rule, inputs, cotangents)
    except (RuntimeError, ValueError):
        return False  # what MLX does not take at all it has no gradient of
    return primitive_count(FUSED_GRADIENT, *gradients) > 0


def check_fused_delta_rule(shape: DeltaShape) -> Agreement:
    """Compare value and gradients of MLX's operation with the recurrence, token by token, and over
    more tokens with the chunked form; once per process, shape and device."""
    return _check(shape, str(mx.default_device()))


@cache
def _check(shape: DeltaShape, device: str) -> Agreement:
    return summarize(
        "MLX's fused operation", shape.dtype, TOLERANCES[shape.dtype], _differences(shape)
    )


def forget_checks() -> None:
    """Forget what MLX was asked and what was compared, as a new process would."""
    _graph_is_fused.cache_clear()
    _check.cache_clear()


_GRADIENT = "the gradient of"
_NAMES = ("the outputs", "the state", *(f"{_GRADIENT} {name}" for name in _INPUTS))


def _differences(shape: DeltaShape) -> Iterator[Difference]:
    cases = [(size, gated_delta_ops) for size in SHORT] + [(LONG, chunked_delta_rule)]
    for (batch, tokens), reference in cases:
        inputs, cotangents = _samples(shape, batch, tokens)
        exact = [a.astype(mx.float32) for a in inputs], [a.astype(mx.float32) for a in cotangents]
        actual = _results(fused_delta_rule, inputs, cotangents)
        expected = _results(reference, *exact)
        for name, one, two in zip(_NAMES, actual, expected, strict=True):
            where = f"{name} after {tokens} tokens"
            yield Difference(relative_difference(one, two), where, name.startswith(_GRADIENT))


def _results(
    rule: Callable, inputs: Sequence[mx.array], cotangents: Sequence[mx.array]
) -> list[mx.array]:
    """Return outputs, state and the gradients of the six inputs."""
    values, gradients = mx.vjp(rule, list(inputs), list(cotangents))
    return [*values, *gradients]


def _samples(shape: DeltaShape, batch: int, tokens: int) -> tuple[list[mx.array], list[mx.array]]:
    """Return inputs as the models have them, decays strong and weak, and cotangents."""
    key_heads, heads, key_size, value_size, dtype, vector_gates = shape
    keys = iter(mx.random.split(mx.random.key(0), 8))

    def normal(*sizes: int) -> mx.array:
        return mx.random.normal((batch, *sizes), key=next(keys))

    q, k = (normal(tokens, key_heads, key_size) for _ in range(2))
    q, k = (a / mx.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    v = normal(tokens, heads, value_size)
    g = mx.sigmoid(2 + 3 * normal(tokens, heads, *([key_size] if vector_gates else [])))
    beta = mx.sigmoid(normal(tokens, heads))
    state, d_out, d_state = (
        normal(heads, value_size, key_size),
        normal(tokens, heads, value_size),
        normal(heads, value_size, key_size),
    )
    q, k, v, beta, d_out = (a.astype(dtype) for a in (q, k, v, beta, d_out))
    return [q, k, v, g, beta, state], [d_out, d_state]


def observe_delta_rule(model: Any) -> tuple[DeltaShape, ...]:
    """Return the shapes that the model's layers really compute the gated delta rule with, each
    once, as seen in a forward pass of which nothing is evaluated; none if they compute others.

    Raises:
        TypeError: the model's caches cannot be forked; see `prefix_cache.reason_not_shareable`.
    """
    shapes: dict[DeltaShape, None] = {}

    def observing(
        q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array]:
        (key_heads, key_size), (heads, size) = k.shape[2:], v.shape[2:]
        dtype = mx.result_type(q, k, v)
        shapes[DeltaShape(key_heads, heads, key_size, size, dtype, g.ndim == 4)] = None
        return mx.zeros(v.shape, q.dtype), state

    modules = [m for m in patchable_modules(model) if "gated_delta_update" in vars(m)]
    if not modules:
        return ()
    was_training = model.training
    model.train()  # in evaluation on a GPU the layers call mlx-lm's kernel for inference
    try:
        # Dropout draws random numbers, which must not be missing afterwards.
        with seeded(0), patched(modules, Operations(None, observing)):
            run_trunk(model, mx.zeros((1, OBSERVED_TOKENS), mx.int32), empty_caches(model))
    finally:
        model.train(was_training)
    return tuple(shapes)


def choose_delta_rule(model: Any) -> tuple[DeltaRule | None, str | None]:
    """Return what computes the gated delta rule in this model while training, and a note that says
    so and why; (None, None) for a model without it.

    Raises:
        TypeError: the model's caches cannot be forked; see `prefix_cache.reason_not_shareable`.
    """
    shapes = observe_delta_rule(model)
    if not shapes:
        return None, None
    reasons = dict.fromkeys(filter(None, map(_reason_for_chunks, shapes)))
    if not reasons:
        note = "MLX's fused operation, whose gradient agrees with the recurrence's"
        return fused_delta_rule, f"delta rule: {note}"
    how = f"{CHUNK} tokens at a time in matrix products"
    return chunked_delta_rule, f"delta rule: {how} ({', '.join(reasons)})"


def _reason_for_chunks(shape: DeltaShape) -> str | None:
    """Return why MLX's operation is not used for this shape; None where it is."""
    if not has_fused_delta_gradient(shape):
        where = f"for {shape.description}" if is_gpu() else "on the CPU"
        return f"MLX has no fused gradient {where}"
    agreement = check_fused_delta_rule(shape)
    return None if agreement.passed else f"{agreement.name} {agreement.failure}"
