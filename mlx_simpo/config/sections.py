"""The sections of the configuration except train: every setting with its default and its rule.

The help texts are what `mlx-simpo train --help` prints, after the setting's name and default.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from .schema import FRACTION, NON_EMPTY, NON_NEGATIVE, POSITIVE, Rule, Section, setting

_BELOW_HALF = Rule("at least 0 and less than 0.5", lambda v: 0 <= v < 0.5)


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """The parameters of SimPO's loss; see `objectives`."""

    NAME: ClassVar[str] = "objective"

    # Where the authors' README says to start: beta 2.0 to 2.5, gamma_beta_ratio 0.5.
    beta: float = setting(
        2.0, "scale of the reward; the published recipes use 2.0 to 2.5, or 10", POSITIVE
    )
    gamma_beta_ratio: float = setting(
        0.5, "target reward margin divided by beta, usually 0 to 1", NON_NEGATIVE
    )
    loss_type: Literal["sigmoid", "hinge"] = setting("sigmoid", "sigmoid or hinge loss")
    label_smoothing: float = setting(
        0.0, "probability that a pair's labels are swapped (sigmoid only)", _BELOW_HALF
    )
    sft_weight: float = setting(
        0.0, "weight of the chosen responses' cross-entropy (helps maths, hurts chat)", NON_NEGATIVE
    )

    def conflicts(self) -> Iterator[str]:
        """Yield a message for all settings that exclude each other."""
        if self.loss_type == "hinge" and self.label_smoothing:
            yield (
                f"objective.label_smoothing is {self.label_smoothing}; it must be 0 with "
                "objective.loss_type=hinge, which has no label smoothing"
            )


@dataclass(frozen=True)
class LoRAConfig(Section):
    """Which weights are trained."""

    NAME: ClassVar[str] = "lora"

    rank: int = setting(16, "rank of the LoRA delta", POSITIVE)
    lora_alpha: float | None = setting(
        None, "the LoRA delta is scaled by lora_alpha / rank; null: 2 × rank", POSITIVE
    )
    scale: float | None = setting(
        None, "scale of the LoRA delta itself, as in mlx-lm; instead of lora.lora_alpha", POSITIVE
    )
    dropout: float = setting(0.0, "dropout on the input of the LoRA delta", FRACTION)
    rslora: bool = setting(False, "scale by lora_alpha / sqrt(rank) (rank-stabilized LoRA)")
    dora: bool = setting(False, "train magnitudes as well (weight-decomposed LoRA)")
    target_modules: str | tuple[str, ...] = setting(
        "all-linear",
        "modules to adapt: all-linear (every linear module of a layer), or names such as [q_proj]",
    )
    num_layers: int = setting(
        -1,
        "number of layers to adapt, counted from the last; -1: all",
        Rule("-1 (all) or 1 and greater", lambda v: v == -1 or v >= 1),
    )
    init_from: str | None = setting(
        None, "folder of an mlx-lm adapter to start from", NON_EMPTY, on_resume="free"
    )

    def conflicts(self) -> Iterator[str]:
        """Yield a message for all settings that exclude each other."""
        if self.scale is not None and (self.lora_alpha is not None or self.rslora):
            other = "lora.rslora" if self.rslora else "lora.lora_alpha"
            yield (f"lora.scale and {other} both set the scale; remove one of them")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            yield (
                f"lora.target_modules is {self.target_modules!r}; it must be all-linear or a list, "
                f"[{self.target_modules}]"
            )
        elif not self.target_modules:
            yield ("lora.target_modules is empty; name at least one module")

    @property
    def resolved_scale(self) -> float:
        """The factor of the LoRA delta B·A: alpha / rank, with rsLoRA alpha / sqrt(rank).

        Hu et al., arXiv:2106.09685, section 4.1; Kalajdzievski, arXiv:2312.03732.
        """
        if self.scale is not None:
            return self.scale
        alpha = 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha
        return alpha / self.rank**0.5 if self.rslora else alpha / self.rank


@dataclass(frozen=True)
class LogpsConfig(Section):
    """How log-probabilities are computed from logits."""

    NAME: ClassVar[str] = "logps"

    impl: Literal["auto", "kernel", "mlx"] = setting(
        "auto",
        "kernel: one fused GPU kernel; mlx: MLX's own operations; auto: the kernel if MLX runs on "
        "a GPU (engine shared_prefix only)",
        on_resume="rounding",
    )


@dataclass(frozen=True)
class EngineConfig(Section):
    """What the shared-prefix engine computes with."""

    NAME: ClassVar[str] = "engine"

    attention: Literal["auto", "mlx", "blocks"] = setting(
        "auto",
        "attention while training: mlx: MLX's fused operation; blocks: our own sequence of matrix "
        "products; auto: on a GPU whichever is quicker at the run's lengths, blocks on a CPU",
        on_resume="rounding",
    )
    calibration: Literal["auto", "off"] = setting(
        "auto",
        "auto: on a GPU, measure for up to 3 seconds how pairs are best divided into micro-batches "
        "and which attention is quicker; off: the built-in numbers",
        on_resume="rounding",
    )


@dataclass(frozen=True)
class MemoryConfig(Section):
    """How much memory MLX may use, and keep."""

    NAME: ClassVar[str] = "memory"

    limit_gb: float | None = setting(
        None,
        "GB (10^9 bytes) that a run may need by its forecast, and beyond which MLX waits for "
        "running work before it begins more; null: what MLX can use here, and MLX's own limit",
        POSITIVE,
        on_resume="free",
    )
    cache_limit_gb: float | None = setting(
        None,
        "GB of freed memory that MLX keeps for later arrays, 0 or more; null: MLX's own limit, at "
        "most 1",
        NON_NEGATIVE,
        on_resume="free",
    )
    wired_limit_gb: float | None = setting(
        None,
        "GB that macOS may not page out in a training, 0 or more; null: what Metal recommends",
        NON_NEGATIVE,
        on_resume="free",
    )
