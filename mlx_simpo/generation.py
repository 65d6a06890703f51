"""The Python API of generating responses: whole ones, or token by token."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict, Unpack, cast, overload

from .config.simpo_config import SimPOConfig
from .model.adapters import check_adapter, check_fits, load_adapter
from .model.record import RECORD_KEY, get_dict
from .model.switch import AdapterSwitch
from .planning.memory_limits import memory_limits, set_memory_limits
from .reporting import advice
from .reporting.display import Display
from .sampling.prompts import Prompt, named
from .sampling.responder import Responder, ResponsePart
from .sampling.settings import MAX_TOKENS, SamplingSettings
from .training.datasets import create_encoder
from .training.session import load_base_model


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate`, for type checkers."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    system_prompt: str | None
    base: bool
    display: Display | None


@overload
def generate(  # pyright: ignore[reportOverlappingOverload] -- a str is a Sequence[str], too
    config: SimPOConfig,
    prompt: Prompt,
    adapter: str | Path | None = None,
    **options: Unpack[GenerateOptions],
) -> dict[str, str]: ...


@overload
def generate(
    config: SimPOConfig,
    prompt: Sequence[Prompt],
    adapter: str | Path | None = None,
    **options: Unpack[GenerateOptions],
) -> list[dict[str, str]]: ...


def generate(
    config: SimPOConfig,
    prompt: Prompt | Sequence[Prompt],
    adapter: str | Path | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    system_prompt: str | None = None,
    base: bool = True,
    display: Display | None = None,
) -> dict[str, str] | list[dict[str, str]]:
    """Generate the base model's response to a prompt, and the adapter's if there is one.

    Args:
        prompt: text of one user turn; a conversation, as a list of messages ({"role": …,
            "content": …}) that ends with the user; or a list of such prompts.
        adapter: folder of an mlx-lm adapter.
        max_tokens, temperature, top_p, top_k, min_p, seed: see `SamplingSettings`. The default is
            greedy decoding: the likeliest token each time.
        system_prompt: text of a system turn in front of each prompt.
        base: whether the base model responds, too, if there is an adapter.
        display: where notes are shown; default: stderr.

    Returns:
        The base model's response as "base" and the adapter's as "adapter"; for a list of prompts a
        list of these, in the same order.

    Raises:
        SimPOError: a model, adapter, prompt or setting that cannot be read or used.
    """
    settings = SamplingSettings(max_tokens, temperature, top_p, top_k, min_p, seed)
    is_one = isinstance(prompt, str) or (
        len(prompt) > 0 and all(isinstance(part, dict) for part in prompt)
    )
    prompts = cast(list[Prompt], [prompt] if is_one else list(prompt))
    results: list[dict[str, str]] = [{} for _ in prompts]
    with memory_limits(config.memory):
        for part in stream_responses(
            config,
            prompts,
            adapter,
            settings,
            system_prompt=system_prompt,
            base=base,
            display=display,
        ):
            if part.response is not None:
                results[part.prompt][part.source] = part.response.text
    return results[0] if is_one else results


def stream_responses(
    config: SimPOConfig,
    prompts: Sequence[Prompt],
    adapter: str | Path | None = None,
    settings: SamplingSettings = SamplingSettings(),  # noqa: B008, it is frozen
    *,
    system_prompt: str | None = None,
    base: bool = True,
    display: Display | None = None,
) -> Iterator[ResponsePart]:
    """Return an iterator over responses as they are generated, one part per token.

    >>> for part in stream_responses(config, ["What is a comet?"]):
    ...     print(part.text, end="", flush=True)

    Prompts follow each other, and to each one the base model responds before the adapter. See
    `generate` for the arguments and what is raised, all of it by this call.

    Raises:
        SimPOError: as above.
    """
    settings.check()  # before a model is loaded
    responder = load_responder(config, adapter, display)
    return responder.respond(named(prompts), settings, system_prompt=system_prompt, base=base)


def load_responder(
    config: SimPOConfig, adapter: str | Path | None = None, display: Display | None = None
) -> Responder:
    """Load a model, and an adapter if there is one, to generate responses.

    MLX's memory limits are those of the settings from here on. (What is wired while a response is
    generated is what Metal recommends in any case: mlx-lm sees to that itself.)

    Raises:
        SimPOError: a model or adapter that cannot be read or used.
    """
    display = display or Display()
    set_memory_limits(config.memory)
    if adapter is not None:
        check_adapter(adapter)  # before a model is loaded
    loaded = load_base_model(config, display)
    model, tokenizer = loaded.model, loaded.tokenizer
    encoder = create_encoder(tokenizer, config, display)
    model.eval()
    if adapter is None:
        return Responder(model, tokenizer, encoder)
    check_fits(model, adapter)
    record = get_dict(load_adapter(model, adapter), RECORD_KEY)
    template = encoder.renderer.text
    display.warn(advice.adapter_mismatch(record, loaded, template, config.data))
    return Responder(model, tokenizer, encoder, AdapterSwitch(model))
