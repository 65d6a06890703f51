"""Preparing a run: reading and tokenizing its datasets, loading the model, attaching LoRA."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..config.simpo_config import SimPOConfig
from ..data.encode import EncodedPair, Encoder
from ..data.mixing import SourceCounts
from ..data.pairs import Quarantined
from ..engine.calibrated import run_engine
from ..engine.choice import Engine
from ..engine.figures import Figures
from ..engine.vocabulary import check_prompt_ids, check_token_ids
from ..errors import SimPOError
from ..evaluation import Evaluation, evaluate_pairs
from ..kernels.choice import choose_implementation
from ..model.adapters import read_adapter_config, save_adapter
from ..model.loading import LoadedModel, load_model
from ..model.lora import attach_lora
from ..model.record import RECORD_KEY, get_dict, training_record
from ..planning.memory_limits import set_memory_limits
from ..reporting import advice
from ..reporting.display import Display
from ..sampling.prompts import named, prompt_tokens
from .datasets import RunPairs, read_pairs, warn_of_leaks
from .state import TrainingState
from .trainer import StepMetrics, total_steps, train_steps


@dataclass
class Session:
    """A run that is ready to train: the model with LoRA attached, the pairs as tokens.

    >>> session = prepare(config)
    >>> for step in session.steps():
    ...     print(step.step, step.metrics["loss"])
    ...     if step.step % 100 == 0:
    ...         session.save(f"adapter-{step.step}")

    train: the training pairs. valid_sets: the validation pairs by the name of their set; one that
    has no name is "". valid_main: the set that decides which adapter is best. sources: what there
    is of each training source. adapter: the content of mlx-lm's adapter_config.json. record: what
    the adapter is trained on (`model.record.training_record`). loaded: the base model as it was
    loaded. state: how far the training is. display: where notes and progress of all methods go.
    """

    config: SimPOConfig
    model: nn.Module
    tokenizer: Any
    encoder: Encoder
    adapter: dict[str, Any]
    train: Sequence[EncodedPair]
    valid_sets: dict[str, Sequence[EncodedPair]]
    valid_main: str
    sources: dict[str, SourceCounts]
    quarantined: list[Quarantined]
    engine: Engine
    display: Display
    record: dict[str, Any]
    loaded: LoadedModel
    state: TrainingState

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the whole training."""
        return total_steps(self.config, self.train)

    @property
    def valid(self) -> Sequence[EncodedPair]:
        """The validation pairs of the main set; empty if there are none."""
        return self.valid_sets.get(self.valid_main, ())

    def steps(self) -> Iterator[StepMetrics]:
        """Train, one optimizer step after another; see `trainer.train_steps`.

        Called again after a ``break``, it goes on with the next step.
        """
        return train_steps(self.model, self.train, self.config, self.engine, self.state)

    def evaluate(
        self, title: str = "Evaluating", check: Callable[[], None] = lambda: None
    ) -> Evaluation:
        """Evaluate the current weights on the validation pairs, of several sets on the main one.

        Args:
            title: of the progress bar. check: called after each batch; what it raises ends the
                evaluation.

        Raises:
            SimPOError: there are no validation pairs.
        """
        if not self.valid:
            raise SimPOError(
                "there are no validation pairs; set data.valid, or data.valid_fraction above 0"
            )
        return self._evaluate(self.valid, title, check)

    def evaluate_sets(
        self, title: str = "Evaluating", check: Callable[[], None] = lambda: None
    ) -> dict[str, Evaluation]:
        """Evaluate the current weights on each set of validation pairs; see `evaluate`.

        Returns:
            The evaluations by the names of the sets; {} without validation pairs.
        """
        return {
            name: self._evaluate(pairs, f"{title} ({name})" if name else title, check)
            for name, pairs in self.valid_sets.items()
        }

    def _evaluate(
        self, pairs: Sequence[EncodedPair], title: str, check: Callable[[], None]
    ) -> Evaluation:
        return evaluate_with_progress(
            self.model, pairs, self.config, self.engine, self.display, title, check
        )

    def save(self, folder: str | Path) -> Path:
        """Save the current adapter with its configuration and chat template.

        Returns:
            The folder.

        Raises:
            SimPOError: the folder cannot be written.
        """
        metadata = {"model": self.config.model, RECORD_KEY: self.record}
        texts = {"config.yaml": self.config.to_yaml()}
        # An adapter needs the template it was trained with, which is not always the tokenizer's
        # own.
        if self.encoder.renderer.text is not None:
            texts["chat_template.jinja"] = self.encoder.renderer.text
        return save_adapter(folder, self.model, {**metadata, **self.adapter}, texts)


def prepare(
    config: SimPOConfig,
    display: Display | None = None,
    *,
    train: Any = None,
    valid: Any = None,
    resuming: bool = False,
    figures: Figures | None = None,
) -> Session:
    """Prepare a run up to its first step; every error of the input is raised here.

    MLX's memory limits are those of the settings from here on.

    Args:
        display: where notes and progress go; default: stderr. train, valid: rows from memory
            instead of data.train and data.valid (docs/data.md says which kinds); valid may be
            several sets by name, {"chat": rows, "safety": rows}, the first of which is the main
            one. resuming: the weights come from a checkpoint, and ``lora.init_from`` is not read.
            figures: of the engine, if the run has recorded them; see `calibrated.run_engine`.

    Raises:
        SimPOError: data, a model or settings that cannot be read or used.
    """
    display = display or Display()
    # First, so that what cannot run or be set here is reported before anything is read.
    choose_implementation(config.logps.impl)
    set_memory_limits(config.memory)
    # All records are checked before a model of gigabytes is downloaded.
    encoder, pairs, quarantined = read_pairs(config, train, valid, display)
    if config.train.eval_every is not None and not pairs.valid:
        raise SimPOError(
            f"train.eval_every is {config.train.eval_every}, but there are no validation pairs; "
            "set data.valid, or data.valid_fraction above 0"
        )
    if not resuming:  # it was said when the run began
        warn_of_leaks(pairs, display)
    loaded = load_base_model(config, display)  # its weights are read when first used
    model, template = loaded.model, encoder.renderer.text
    _check_tokens(config, pairs, encoder, model)
    adapter = _attach_adapter(config, loaded, template, display, resuming)
    return Session(
        config=config,
        model=model,
        tokenizer=encoder.tokenizer,
        encoder=encoder,
        adapter=adapter,
        train=pairs.train,
        valid_sets={**pairs.valid},
        valid_main=config.data.valid_main or next(iter(pairs.valid), ""),
        sources=pairs.sources,
        quarantined=quarantined,
        engine=run_engine(config, model, pairs.train, figures),
        display=display,
        record=training_record(loaded, config, template),
        loaded=loaded,
        state=TrainingState(model, config, total_steps(config, pairs.train)),
    )


def _check_tokens(config: SimPOConfig, pairs: RunPairs, encoder: Encoder, model: nn.Module) -> None:
    """Check that all tokens are in the model's vocabulary; see `engine.vocabulary`."""
    for part in (pairs.train, *pairs.valid.values()):
        check_token_ids(part, model, config.model)
    for prompt in named(config.train.sample_prompts):
        check_prompt_ids(prompt_tokens(encoder, prompt), model, config.model)


def _attach_adapter(
    config: SimPOConfig, loaded: LoadedModel, template: str | None, display: Display, resuming: bool
) -> dict[str, Any]:
    """Attach LoRA to the model and return its adapter_config.json; see `model.lora.attach_lora`."""
    lora = replace(config.lora, init_from=None) if resuming else config.lora
    if lora.init_from is not None:
        initial = get_dict(read_adapter_config(lora.init_from), RECORD_KEY)
        display.warn(advice.adapter_mismatch(initial, loaded, template, config.data))
    return attach_lora(loaded.model, lora, config.seed)


def load_base_model(config: SimPOConfig, display: Display) -> LoadedModel:
    """Load the model of these settings, and warn about what will be slow or different.

    Raises:
        SimPOError: it cannot be loaded.
    """
    loaded = load_model(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    display.warn(advice.slow_blas())
    display.warn(advice.slow_on_cpu(loaded.dtype, "quantization" in loaded.config))
    # The caches show whether mlx-lm runs a sliding window; config.json only says that it exists.
    caches = make_prompt_cache(loaded.model)
    display.warn(advice.ignored_window(loaded.config, caches, config.data.max_length))
    return loaded


def evaluate_with_progress(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    config: SimPOConfig,
    engine: Engine,
    display: Display,
    title: str,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate pairs with a progress bar; see `evaluate_pairs` and, for check, `Session`."""
    options = config.train
    with display.progress(title, len(pairs)) as show:

        def advance(done: int) -> None:
            show(done)
            check()

        return evaluate_pairs(
            model,
            pairs,
            config.objective,
            options.batch_size,
            advance,
            engine,
            options.max_tokens_per_step,
        )
