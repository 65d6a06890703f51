"""Generating from Python: one prompt or several, with the settings of mlx_lm."""

from pathlib import Path
from typing import Any

import pytest
from helpers.commands import captured_display
from helpers.tiny import assistant, system, user

from mlx_simpo import SimPOConfig, SimPOError, generate, generation, stream_responses
from mlx_simpo.sampling.settings import SamplingSettings

QUIET = captured_display()[0]


@pytest.fixture
def config(model_folder: Path) -> SimPOConfig:
    return SimPOConfig(model=str(model_folder))


def test_one_prompt_has_one_result_and_a_list_has_a_list(
    config: SimPOConfig, strong_adapter: Path
) -> None:
    turns = [user("Hi"), assistant("Hello."), user("Why?")]
    one = generate(config, "Why?", strong_adapter, max_tokens=6, display=QUIET)
    conversation = generate(config, turns, strong_adapter, max_tokens=6, display=QUIET)
    assert one.keys() == conversation.keys() == {"base", "adapter"}
    several = generate(config, ["Why?", turns], strong_adapter, max_tokens=6, display=QUIET)
    assert several == [one, conversation]
    assert generate(config, ["Why?"], max_tokens=6, display=QUIET) == [{"base": one["base"]}]
    only = generate(config, "Why?", strong_adapter, max_tokens=6, base=False, display=QUIET)
    assert only == {"adapter": one["adapter"]}


def test_every_option_has_an_effect(config: SimPOConfig) -> None:
    """Against forgetting one between here and mlx_lm."""

    def respond(**options: Any) -> str:
        options = {"max_tokens": 12, "temperature": 3.0, "seed": 1, **options}
        return generate(config, "Why is the sky blue?", display=QUIET, **options)["base"]

    sampled = respond()
    assert respond() == sampled
    for change in (
        {"max_tokens": 5},
        {"temperature": 0.5},
        {"top_p": 0.3},
        {"top_k": 2},
        {"min_p": 0.9},
        {"seed": 2},
        {"system_prompt": "numbers"},
    ):
        assert respond(**change) != sampled, change
    # Drawing from one token only is greedy decoding.
    greedy = generate(config, "Why is the sky blue?", max_tokens=12, display=QUIET)["base"]
    assert respond(top_k=1) == greedy


def test_parts_come_while_they_are_generated(config: SimPOConfig) -> None:
    settings = SamplingSettings(max_tokens=6)
    parts = stream_responses(config, ["Why?", "Who?"], settings=settings, display=QUIET)
    texts = ["", ""]
    for part in parts:
        texts[part.prompt] += part.text
    expected = generate(config, ["Why?", "Who?"], max_tokens=6, display=QUIET)
    assert texts == [result["base"] for result in expected]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "there are no prompts"),
        ("", {}, "the prompt is empty"),
        (["a", " "], {}, "prompt 2 is empty"),
        ([user("a"), "b"], {}, "prompt 1 must be text or a list of messages, not {'role'"),
        ([system("a")], {}, "ends with a turn of the system"),
        ("a", {"top_p": 0.5}, "top_p is 0.5, which has no effect at temperature 0"),
        ("a", {"temperature": 1.0, "top_k": 512}, "top_k is 512; it must be less than the 512"),
        ("a", {"base": False}, "base is False and there is no adapter"),
    ],
)
def test_what_cannot_be_generated(
    prompt: Any, options: dict[str, Any], message: str, config: SimPOConfig
) -> None:
    with pytest.raises(SimPOError) as raised:
        generate(config, prompt, display=QUIET, **options)
    assert message in str(raised.value)


def test_settings_and_adapter_are_checked_before_a_model_is_loaded(
    config: SimPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "load_base_model", pytest.fail)
    with pytest.raises(SimPOError, match="seed is 3, which has no effect"):
        generate(config, "a", seed=3, display=QUIET)
    with pytest.raises(SimPOError, match="is not the folder of an adapter"):
        generate(config, "a", tmp_path, display=QUIET)
