"""Responses to several prompts: each as if it were alone, of the base model as without adapter."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import user

from mlx_simpo import ResponsePart, SamplingSettings, SimPOConfig, SimPOError
from mlx_simpo.generation import load_responder
from mlx_simpo.sampling import responder as responder_module
from mlx_simpo.sampling.prompts import named
from mlx_simpo.sampling.responder import Responder

PROMPTS = named(["Why is the sky blue?", [user("Be kind.")], "numbers 0 1 2", "Be kind."])
SHORT = SamplingSettings(max_tokens=8)
SAMPLED = SamplingSettings(max_tokens=8, temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def base(model_folder: Path) -> Responder:
    return load_responder(SimPOConfig(model=str(model_folder)))


@pytest.fixture(scope="module")
def adapted(model_folder: Path, strong_adapter: Path) -> Responder:
    return load_responder(SimPOConfig(model=str(model_folder)), strong_adapter)


def texts(responder: Responder, prompts: Any = PROMPTS, **options: Any) -> list[tuple]:
    """(number, source, text) of each response, after checking that its parts are its text."""
    options.setdefault("settings", SHORT)
    result, streamed = [], ""
    for part in responder.respond(prompts, **options):
        streamed += part.text
        if part.response is not None:
            assert streamed == part.response.text
            result.append((part.prompt, part.source, streamed))
            streamed = ""
    assert not streamed
    return result


@pytest.mark.parametrize("settings", [SHORT, SAMPLED])
def test_the_base_model_responds_as_without_an_adapter(
    base: Responder, adapted: Responder, settings: SamplingSettings
) -> None:
    both = texts(adapted, settings=settings)
    assert [row[:2] for row in both] == [(n, s) for n in range(4) for s in ("base", "adapter")]
    assert both[::2] == texts(base, settings=settings)
    assert all(ours[2] != theirs[2] for ours, theirs in zip(both[::2], both[1::2], strict=True))
    only = texts(adapted, settings=settings, base=False)
    assert only == both[1::2]
    assert texts(adapted, settings=settings) == both


def test_a_response_does_not_depend_on_the_prompts_beside_it(adapted: Responder) -> None:
    together = texts(adapted, settings=SAMPLED)
    for number, prompt in enumerate(PROMPTS):
        alone = texts(adapted, [prompt], settings=SAMPLED)
        assert [row[1:] for row in alone] == [row[1:] for row in together if row[0] == number]
    # A text and one user turn with it are the same prompt.
    assert [row[1:] for row in together[2:4]] == [row[1:] for row in together[6:8]]


def test_without_a_seed_each_prompt_has_its_own_and_both_models_share_it(
    adapted: Responder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter((5, 6))
    monkeypatch.setattr(responder_module, "draw_seed", lambda: next(drawn))
    sampled = SamplingSettings(max_tokens=4, temperature=1.0)
    parts = list(adapted.respond(PROMPTS[:2], sampled))
    assert [part.response.seed for part in parts if part.response] == [5, 5, 6, 6]
    monkeypatch.undo()
    seeds = {p.response.seed for p in adapted.respond(PROMPTS, sampled) if p.response}
    assert len(seeds) == 4


def test_a_system_prompt_changes_the_responses(base: Responder) -> None:
    with_system = texts(base, system_prompt="numbers 0 1 2 3, newlines and spaces")
    assert with_system != texts(base)
    # It is the text that the template writes by itself.
    assert texts(base, system_prompt="Be kind.") == texts(base)


def test_an_invalid_prompt_is_an_error_before_anything_is_generated(
    base: Responder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder_module, "stream_response", pytest.fail)
    for prompts, options, message in (
        (named(["fine", ""]), {}, "prompt 2 is empty"),
        ([], {}, "there are no prompts; name at least one"),
        (PROMPTS, {"settings": SamplingSettings(0)}, "max_tokens is 0; it must be 1 or greater"),
        (PROMPTS, {"base": False}, "base is False and there is no adapter"),
        (PROMPTS, {"system_prompt": ""}, "the system prompt is empty"),
    ):
        with pytest.raises(SimPOError, match=message):
            base.respond(prompts, **{"settings": SHORT, **options})


def test_parts_are_public_values(base: Responder) -> None:
    part = next(base.respond(PROMPTS, SHORT))
    assert isinstance(part, ResponsePart)
    assert part[:2] == (0, "base")
