"""What one device makes of one model: the numbers that only a measurement can give."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

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
    attention: what computes attention while training: our blocks, or MLX's fused operation.
    source: where the figures come from, for the user.
    """

    pass_cost: int
    max_positions: int
    tile_scores: int
    attention: AttentionName
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "Figures":
        """Return the figures of `as_dict`.

        Raises:
            SimPOError: values are not what `as_dict` returns.
        """
        expected = {f.name: str if f.name in ("attention", "source") else int for f in fields(cls)}
        if not isinstance(values, dict) or {k: type(v) for k, v in values.items()} != expected:
            raise SimPOError(f"{values!r} are not figures of the engine: remove them")
        return cls(**values)


# Measured on a CPU (docs/engine.md). A tile is what its cache holds.
CPU = Figures(16, 512, 2**19, "blocks", "built-in numbers for a CPU")
# Estimates: GPUs take some microseconds to start each operation. `calibration` measures them.
GPU = Figures(32, 4096, 2**24, "blocks", "built-in estimates for a GPU")


def default_figures() -> Figures:
    """Return the built-in figures for MLX's default device."""
    return GPU if is_gpu() else CPU
