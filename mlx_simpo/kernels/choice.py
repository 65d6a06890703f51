"""Which implementation makes log-probabilities of logits here, and the proof that it may."""

from functools import cache
from typing import Literal, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..errors import SimPOError
from .built_in import IGNORED, built_in
from .launch import backend, launch

Name = Literal["auto", "kernel", "mlx"]


class ResponseLogps(Protocol):
    """log p(targets) of rows of logits, and its gradient.

    Args:
        products: [C, V] float32, float16 or bfloat16, what the head's matrix product leaves; logits
            are softcap · tanh(scale · products / softcap), or scale · products where softcap is 0.
        targets: int32 [C], tokens; −100 leaves a row out: log-probability and gradient are 0. Any
            other number that is no token gives NaN.
        gradient: whether to make it.

    Returns:
        log p, float32 [C], in nats; ∂ log p/∂products [C, V] in their dtype (not multiplied by any
        slope of a loss: half precision keeps its digits), or None.
    """

    def __call__(
        self, products: mx.array, targets: mx.array, *, scale: float, softcap: float, gradient: bool
    ) -> tuple[mx.array, mx.array | None]: ...


class Implementation(NamedTuple):
    """note: what runs, and why."""

    name: str
    note: str
    response_logps: ResponseLogps


BUILT_IN = Implementation("mlx", "MLX's own operations", built_in)


def choose(name: Name = "auto") -> Implementation:
    """The implementation of that name; auto: the kernel on a GPU, MLX's operations on a CPU.

    Raises:
        SimPOError: ``kernel`` where MLX runs on the CPU, or a kernel that does not compile or does
            not agree with MLX's operations.
    """
    where = backend()
    if name == "mlx":
        return BUILT_IN._replace(note="MLX's own operations, as logps.impl=mlx asks")
    if where is None and name == "kernel":
        raise SimPOError(
            "logps.impl is kernel, but MLX runs on the CPU here and the kernel needs a GPU (Metal "
            "or CUDA); leave it out, or set logps.impl=mlx"
        )
    if where is None:
        return BUILT_IN._replace(note="MLX's own operations, as MLX runs on the CPU")
    check(where)
    return Implementation("kernel", f"the {where} kernel, which agrees with MLX's own", launch)


@cache
def check(where: str) -> None:
    """SimPOError unless the kernel equals MLX's operations on a small input; once in a process."""
    for dtype, tolerance in ((mx.float32, 2e-5), (mx.bfloat16, 1e-2)):
        for scale, softcap in ((1.0, 0.0), (0.5, 5.0)):
            products, targets = sample(dtype)
            settings = {"scale": scale, "softcap": softcap, "gradient": True}
            try:
                found = launch(products, targets, **settings)
                mx.eval(found)
            except (RuntimeError, ValueError) as error:
                raise SimPOError(_report(where, f"does not run: {error}")) from error
            expected = built_in(products, targets, **settings)
            for one, two in zip(found, expected, strict=True):
                difference = _difference(one, two)
                if not difference <= tolerance:
                    what = f"is off by {difference:.3g} ({dtype}, softcap {softcap})"
                    raise SimPOError(_report(where, what))


def sample(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Rows of an odd vocabulary, and targets of every kind."""
    products = 4 * mx.random.normal((6, 1027), key=mx.random.key(0))
    return products.astype(dtype), mx.array([0, 1026, 513, IGNORED, -1, 1027], mx.int32)


def _difference(one: mx.array | None, two: mx.array | None) -> float:
    """The largest; infinite if one has NaN where the other has not."""
    first, second = (np.array(a.astype(mx.float32)) for a in (one, two))  # type: ignore[union-attr]
    if (np.isnan(first) != np.isnan(second)).any():
        return float("inf")
    return float(np.nanmax(np.abs(first - second)))


def _report(where: str, what: str) -> str:
    return (
        f"the {where} kernel for log-probabilities {what}. Please report this with what "
        "`mlx-simpo doctor` prints; logps.impl=mlx trains without the kernel"
    )
