"""Changes to a model of mlx-lm's without which it cannot be trained."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import rwkv7


def make_trainable(model: nn.Module) -> None:
    """Change in this model alone what mlx-lm 0.32.2 wrote with only inference in mind.

    - Recurrent Gemma does not call its base class's constructor, and has no list of frozen weights.
    - RWKV 7 computes its recurrence by a kernel on a Mac, which has no gradient; while it trains,
      it gets mlx-lm's own operations for other devices.
    """
    if not hasattr(model, "_no_grad"):
        model._no_grad, model._training = set(), False
    for module in model.modules():
        if type(module) is rwkv7.Rwkv7TimeMixing:
            module.__class__ = TimeMixing


class TimeMixing(rwkv7.Rwkv7TimeMixing):
    """RWKV 7's recurrence, by operations with a gradient while it trains."""

    def _wkv7(
        self,
        r: mx.array,
        w: mx.array,
        k: mx.array,
        v: mx.array,
        a: mx.array,
        b: mx.array,
        state: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        """Return the outputs [B, T, H, D, 1] of all [B, T, H, D], and the state after the last."""
        if not self.training:
            return super()._wkv7(r, w, k, v, a, b, state)
        if state is None:
            state = mx.zeros((*r.shape[:1], *r.shape[2:], r.shape[-1]), r.dtype)
        step: Any = rwkv7._wkv7_step_ops
        outputs: list[Any] = []
        for t in range(r.shape[1]):
            output, state = step(*(x[:, t] for x in (r, w, k, v, a, b)), state)
            outputs.append(output)
        assert state is not None
        return mx.stack(outputs, axis=1).astype(r.dtype), state
