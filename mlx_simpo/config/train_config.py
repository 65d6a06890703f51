"""The settings of the section train: engine, batches, optimizer, and what keeps a run from being
lost."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from .early_stopping import EarlyStoppingConfig
from .schema import FRACTION, NON_NEGATIVE, POSITIVE, Section, setting


@dataclass(frozen=True)
class TrainConfig(Section):
    """Engine, batches, optimizer and schedule.

    The defaults are those of the authors' recipes, except the learning rate, which is for LoRA.
    """

    NAME: ClassVar[str] = "train"

    engine: Literal["reference", "shared_prefix"] = setting(
        "shared_prefix",
        "shared_prefix: compute each prompt once, and logits of scored tokens only; reference: one "
        "stacked forward pass over 2 × batch_size sequences (same results, slower)",
        on_resume="rounding",
    )
    batch_size: int = setting(4, "maximum number of pairs per micro-batch", POSITIVE, "rounding")
    max_tokens_per_step: int | None = setting(
        None,
        "maximum number of tokens per micro-batch, padding included; a lower limit saves memory "
        "and does not change the result; a pair that is longer runs alone",
        POSITIVE,
        on_resume="rounding",
    )
    gradient_accumulation_steps: int = setting(
        4,
        "micro-batches per optimizer step, which equals one step on all their pairs",
        POSITIVE,
        on_resume="rounding",
    )
    epochs: float | None = setting(
        None, "passes over the training pairs; null: 1", POSITIVE, "free"
    )
    steps: int | None = setting(
        None, "number of optimizer steps, instead of epochs", POSITIVE, on_resume="free"
    )
    learning_rate: float = setting(
        5e-5, "peak learning rate (full fine-tuning: 3e-7 to 1e-6)", POSITIVE
    )
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "learning rate after the warm-up: cosine or linear decay to 0, or constant"
    )
    warmup_ratio: float = setting(
        0.1, "fraction of the steps in which the learning rate rises from 0", FRACTION
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", NON_NEGATIVE)
    # torch.optim.AdamW's defaults, as in the authors' recipes.
    adam_beta1: float = setting(0.9, "AdamW's decay rate of the first moment", FRACTION)
    adam_beta2: float = setting(0.999, "AdamW's decay rate of the second moment", FRACTION)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", POSITIVE)
    max_grad_norm: float | None = setting(
        1.0, "clip the gradient to this global norm; null: do not clip", POSITIVE
    )
    gradient_checkpointing: bool = setting(
        False,
        "recompute each layer's activations in the backward pass: less memory, about a third more "
        "time",
        on_resume="rounding",
    )
    compile: bool | None = setting(
        None,
        "compile the step with mx.compile; engine reference only, where null means true (the "
        "shapes of shared_prefix differ from batch to batch, and each would be traced)",
        on_resume="rounding",
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "a step whose loss or gradient is NaN or infinite: stop the run, or skip the step's update",
        on_resume="free",
    )
    max_skipped: int = setting(
        10,
        "stop if more steps than this had to be skipped (on_nonfinite=skip)",
        NON_NEGATIVE,
        "free",
    )
    eval_every: int | None = setting(
        None,
        "evaluate every this many steps, besides before and after training",
        POSITIVE,
        on_resume="free",
    )
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    sample_prompts: tuple[str, ...] = setting(
        (),
        'prompts, such as ["Why is the sky blue?"], to respond to at each evaluation, to see what '
        "becomes of the responses",
        on_resume="free",
    )
    sample_tokens: int = setting(
        100, "maximum number of tokens of a response to sample_prompts", POSITIVE, "free"
    )
    save_every: int | None = setting(
        None, "save a checkpoint every this many steps, besides save_minutes", POSITIVE, "free"
    )
    save_minutes: float | None = setting(
        10.0,
        "save a checkpoint after this many minutes, or less often if saving would take more than a "
        "hundredth of the time; null: only as save_every says",
        POSITIVE,
        on_resume="free",
    )
    keep_checkpoints: int = setting(2, "number of checkpoints to keep", POSITIVE, "free")
    resume: Literal["never", "auto"] = setting(
        "never",
        "auto: if the output folder holds this run, continue it; never: refuse such a folder "
        "(`mlx-simpo train --resume RUN` continues it)",
        on_resume="free",
    )

    memory_check: Literal["error", "warn", "off"] = setting(
        "error",
        "before training, forecast the peak memory from the largest micro-batch: error or warning "
        "if it will not fit, or no forecast",
        on_resume="free",
    )
    keep_awake: bool | None = setting(
        None,
        "keep the Mac awake while it trains (macOS's caffeinate); null: if the command has a "
        "terminal",
        on_resume="free",
    )

    def conflicts(self) -> Iterator[str]:
        """Yield a message for all settings that exclude each other."""
        if self.epochs is not None and self.steps is not None:
            yield (
                "train.epochs and train.steps both set the length; remove one of them, or set it "
                "to null"
            )
        if self.compile and self.engine == "shared_prefix":
            yield (
                "train.compile is true, but only the reference engine can be compiled; remove it, "
                "or set train.engine=reference"
            )
        patience = self.early_stopping.patience
        if patience is not None and self.eval_every is None:
            yield (
                f"train.early_stopping.patience is {patience}, but there are no evaluations during "
                "training; set train.eval_every"
            )

    @property
    def step_pairs(self) -> int:
        """Pairs per optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps
