"""What one device makes of one model: the numbers that only a measurement can give."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ..device import is_gpu
from ..errors import SimPOError

AttentionName = Literal["blocks", "mlx"]


@dataclass(frozen=True)
class Figures:
    """The numbers that the shared-prefix engine is planned with.

    Another set of figures divides a step into other micro-batches, or adds in another order: the
    results differ in the last digits. A run therefore records its figures and resumes with them.

    pass_cost: positions (tokens through the trunk) that one more forward pass costs.
    max_positions: positions at which a micro-batch keeps the device busy; more only take memory.
    tile_scores: scores that `attention.attention` computes at once.
    chunk_logits: logits that `token_logps.token_logps` computes at once, at most.
    attention: what computes attention while training: our blocks, or MLX's fused operation.
    source: where the figures come from, for the user.
    evidence: what was measured beside them, for the user; "" if nothing was.
    """

    pass_cost: int
    max_positions: int
    tile_scores: int
    chunk_logits: int
    attention: AttentionName
    source: str
    evidence: str = ""

    @property
    def note(self) -> str:
        """The figures and where they come from, in plain English."""
        cost = f"{self.pass_cost:,} token{'s' if self.pass_cost > 1 else ''}"
        note = (
            f"{self.source}: micro-batches of up to {self.max_positions:,} tokens; one more "
            f"forward pass costs as much as {cost}"
        )
        return f"{note}; {self.evidence}" if self.evidence else note

    def as_dict(self) -> dict[str, Any]:
        """Return what decides results, for JSON: all but the texts for the user."""
        return {name: getattr(self, name) for name in _RECORDED}

    @classmethod
    def from_dict(cls, values: Any, source: str, evidence: str = "") -> "Figures":
        """Return the figures of `as_dict`, with texts for the user.

        Raises:
            SimPOError: values are not what `as_dict` returns.
        """
        is_valid = (
            isinstance(values, dict)
            and {name: type(value) for name, value in values.items()} == _RECORDED
            and all(value > 0 for value in values.values() if isinstance(value, int))
            and values["attention"] in get_args(AttentionName)
        )
        if not is_valid:
            raise SimPOError(f"{values!r} are not figures of the engine")
        return cls(**values, source=source, evidence=evidence)


_TEXTS = ("source", "evidence")
_RECORDED = {
    f.name: str if f.name == "attention" else int for f in fields(Figures) if f.name not in _TEXTS
}

# Measured on a CPU (docs/engine.md). A tile is what its cache holds.
CPU = Figures(16, 512, 2**19, 2**24, "blocks", "built-in numbers for a CPU")
# Estimates: GPUs take some microseconds to start each operation. `calibration` measures them.
GPU = Figures(32, 4096, 2**24, 2**24, "blocks", "built-in estimates for a GPU")


def default_figures() -> Figures:
    """Return the built-in figures for MLX's default device."""
    return GPU if is_gpu() else CPU
