"""The sections of a run's settings: each name, default, meaning and rule, declared once."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import SimPOError
from .schema import FRACTION, NOT_EMPTY, NOT_NEGATIVE, POSITIVE, SHARE, Rule, Section, setting

_AT_LEAST_TWO = Rule("2 or greater", lambda v: v >= 2)
_BELOW_HALF = Rule("at least 0 and less than 0.5", lambda v: 0 <= v < 0.5)


@dataclass(frozen=True)
class DataConfig(Section):
    """Which pairs, and how they become tokens."""

    NAME: ClassVar[str] = "data"

    train: str | None = setting(
        None, "file (.jsonl, .jsonl.gz, .parquet), folder or Hub data set", NOT_EMPTY
    )
    train_split: str | None = setting(None, "split of a folder or Hub data set to train on")
    valid: str | None = setting(
        None, "pairs to evaluate on; without it, a share of train is held", NOT_EMPTY
    )
    valid_split: str | None = setting(None, "split of a folder or Hub data set to evaluate on")
    subset: str | None = setting(None, "configuration name of a Hub data set that has several")
    valid_fraction: float = setting(
        0.05, "share of the training prompts held out when data.valid is not given", FRACTION
    )
    max_length: int = setting(1024, "tokens of prompt and answer together, at most", _AT_LEAST_TWO)
    max_prompt_length: int = setting(
        512, "tokens a prompt is cut down to (from the left) before answers are cut", POSITIVE
    )
    chat_template: str = setting(
        "auto",
        "auto (the tokenizer's own, plain text if it has none), none (plain text), or another "
        "template: a file or the Jinja text itself",
        NOT_EMPTY,
    )
    compat: Literal["official"] | None = setting(
        None, "official: tokens as in princeton-nlp/SimPO, the scored assistant header included"
    )
    implicit_string_prompts: bool = setting(
        False, "take the words that chosen and rejected strings begin with as their prompt"
    )
    max_quarantined: float = setting(
        0.05, "share of unusable records above which nothing is trained", SHARE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_prompt_length >= self.max_length:
            raise SimPOError(
                f"data.max_prompt_length is {self.max_prompt_length}; it must be less than "
                f"data.max_length ({self.max_length}), so that answers have room"
            )
        if self.valid_split is not None and self.valid is None:
            raise SimPOError(
                "data.valid_split is set without data.valid; set data.valid to the folder or data "
                "set that has this split (it may be the same as data.train)"
            )
        if self.compat == "official" and self.chat_template == "none":
            raise SimPOError(
                "data.compat=official needs a chat template; leave data.chat_template at auto"
            )


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """SimPO's loss; see `objectives`."""

    NAME: ClassVar[str] = "objective"

    beta: float = setting(2.0, "scale of the reward: 2.0 to 2.5, or 10", POSITIVE)
    gamma_beta_ratio: float = setting(
        0.5, "target margin divided by beta (0 to 1; the margin is beta × this)", NOT_NEGATIVE
    )
    loss_type: Literal["sigmoid", "hinge"] = setting("sigmoid", "sigmoid or hinge")
    label_smoothing: float = setting(
        0.0, "probability that a preference is the wrong way round (sigmoid only)", _BELOW_HALF
    )
    sft_weight: float = setting(
        0.0, "weight of the chosen answers' cross-entropy (helps maths, hurts chat)", NOT_NEGATIVE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type == "hinge" and self.label_smoothing:
            raise SimPOError(
                f"objective.label_smoothing is {self.label_smoothing}; it must be 0 with the "
                "hinge loss, which has no such term"
            )


@dataclass(frozen=True)
class LoRAConfig(Section):
    """Which weights are trained."""

    NAME: ClassVar[str] = "lora"

    rank: int = setting(16, "rank of the update", POSITIVE)
    lora_alpha: float | None = setting(
        None, "the update is scaled by lora_alpha / rank; default 2 × rank", POSITIVE
    )
    scale: float | None = setting(
        None, "the update's scale itself, mlx-lm's way, instead of lora_alpha", POSITIVE
    )
    dropout: float = setting(0.0, "dropout on the input of the update", FRACTION)
    rslora: bool = setting(False, "scale by lora_alpha / sqrt(rank) (rank-stabilized LoRA)")
    dora: bool = setting(False, "train magnitudes as well (weight-decomposed LoRA)")
    target_modules: str | tuple[str, ...] = setting(
        "all-linear", "all-linear (every linear layer of a block), or names such as [q_proj]"
    )
    num_layers: int = setting(
        -1,
        "adapt this many blocks, counted from the last; -1: all",
        Rule("-1 (all) or 1 and greater", lambda v: v == -1 or v >= 1),
    )
    init_from: str | None = setting(None, "folder of an mlx-lm adapter to start from", NOT_EMPTY)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and (self.lora_alpha is not None or self.rslora):
            other = "lora.rslora" if self.rslora else "lora.lora_alpha"
            raise SimPOError(f"lora.scale and {other} both set the scale; give one of them")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise SimPOError(
                f"lora.target_modules is {self.target_modules!r}; it must be all-linear or a list, "
                f"[{self.target_modules}]"
            )
        if not self.target_modules:
            raise SimPOError("lora.target_modules is empty; name at least one layer")

    @property
    def resolved_scale(self) -> float:
        """What the update B·A is multiplied by."""
        if self.scale is not None:
            return self.scale
        alpha = 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha
        return alpha / self.rank**0.5 if self.rslora else alpha / self.rank


@dataclass(frozen=True)
class TrainConfig(Section):
    """The optimizer's side; defaults as in the official recipes, the learning rate for LoRA."""

    NAME: ClassVar[str] = "train"

    engine: Literal["reference", "shared_prefix"] = setting(
        "shared_prefix",
        "shared_prefix: each prompt runs once and only scored rows reach the head; reference: the "
        "same numbers the plain way, one stacked forward pass of 2 × batch_size rows",
    )
    batch_size: int = setting(4, "pairs in memory at once, at most", POSITIVE)
    max_tokens_per_step: int | None = setting(
        None,
        "tokens (with padding) in memory at once, at most: a smaller number needs less memory, and "
        "changes nothing else; a pair that is longer runs alone",
        POSITIVE,
    )
    gradient_accumulation_steps: int = setting(
        4, "micro-batches that make one optimizer step, exactly as one large batch", POSITIVE
    )
    epochs: float | None = setting(None, "passes over the pairs; default 1", POSITIVE)
    steps: int | None = setting(None, "optimizer steps, instead of epochs", POSITIVE)
    learning_rate: float = setting(5e-5, "peak rate (full fine-tuning: 3e-7 to 1e-6)", POSITIVE)
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "after the warm-up: cosine or linear to 0, or constant"
    )
    warmup_ratio: float = setting(0.1, "share of the steps that warm up from 0", FRACTION)
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", NOT_NEGATIVE)
    adam_beta1: float = setting(0.9, "AdamW's decay of the first moment", FRACTION)
    adam_beta2: float = setting(0.999, "AdamW's decay of the second moment", FRACTION)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", POSITIVE)
    max_grad_norm: float | None = setting(1.0, "clip the gradients' global norm", POSITIVE)
    gradient_checkpointing: bool = setting(
        False, "recompute each block in the backward pass: less memory, a third more time"
    )
    compile: bool | None = setting(
        None,
        "compile the step (mx.compile), engine reference only, where null means yes: the shapes of "
        "shared_prefix are the data's own, and each would be traced",
    )
    eval_every: int | None = setting(
        None, "evaluate every so many steps as well as before and after training", POSITIVE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.steps is not None:
            raise SimPOError("train.epochs and train.steps both set the length; give one of them")
        if self.compile and self.engine == "shared_prefix":
            raise SimPOError(
                "train.compile is true, but only the reference engine is ever compiled; leave it "
                "out, or set train.engine=reference"
            )

    @property
    def step_pairs(self) -> int:
        """Pairs of one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class LogpsConfig(Section):
    """How logits become log-probabilities."""

    NAME: ClassVar[str] = "logps"

    impl: Literal["auto", "kernel", "mlx"] = setting(
        "auto",
        "kernel: one fused kernel on the GPU; mlx: MLX's own operations; auto: the kernel where "
        "MLX runs on a GPU (engine shared_prefix only)",
    )
