"""Which arguments a template takes, what happens to others, and which it gets."""

from typing import Any

import pytest
from helpers.chat_templates import TEMPLATES, shipped_tokenizer, template_tokenizer
from helpers.tiny import BARE, CHATML, tiny_tokenizer, user

from mlx_simpo import DataConfig, SimPOError
from mlx_simpo.data.encode import Encoder
from mlx_simpo.data.render import Renderer
from mlx_simpo.data.template_args import (
    check_arguments,
    describe_arguments,
    implied_arguments,
    template_variables,
)
from mlx_simpo.errors import InvalidSettingsError

Q = user("Why?")


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        (CHATML, set()),
        (BARE, set()),
        ("{{ bos_token }}{{ raise_exception('x') }}{{ strftime_now('%d') }}{{ range(3) }}", set()),
        (
            "{% if a is defined and not b %}{% set c = d | default(1) %}{{ c }}{% endif %}",
            set("abd"),
        ),
        ("{% macro f(x) %}{{ x ~ y }}{% endmacro %}{{ f(namespace(z=1).z) }}", {"y"}),
        ("{% for m in messages %}{{ m.thinking }}{% break %}{% endfor %}", set()),
        ("{%- generation -%}{{ a }}{% endgeneration %}", {"a"}),
        ("{% if a is not defined %}{% set a = 1 %}{% endif %}{{ a }}", {"a"}),
        ("{% set a = a or 1 %}{% for b in b %}{{ b }}{% endfor %}{{ c }}", set("abc")),
        ("{# enable_thinking #}", set()),
        ("{% unknown a_word %}", {"unknown", "a_word"}),
    ],
)
def test_variables(template: str, variables: set[str]) -> None:
    assert template_variables(template) == variables


def test_variables_of_known_templates() -> None:
    assert template_variables(TEMPLATES["smollm3"].text) == {"enable_thinking", "xml_tools"}
    assert template_variables(TEMPLATES["gpt_oss"].text) == {"reasoning_effort"}
    assert template_variables(TEMPLATES["llama3"].text) == set()


def test_every_argument_that_changes_nothing_is_an_error() -> None:
    arguments = {"enable_thinkin": False, "messages": [], "bos_token": "x", "enable_thinking": True}
    with pytest.raises(InvalidSettingsError) as caught:
        check_arguments(arguments, [TEMPLATES["smollm3"].text], "the tokenizer's own")
    lines = str(caught.value)
    assert (
        "data.template_args.enable_thinkin is set, but the chat template (the tokenizer's own) "
        "does not use it; it uses enable_thinking, xml_tools"
    ) in lines
    for name in ("messages", "bos_token"):
        reserved = f"data.template_args.{name} is set, which mlx-simpo passes itself; remove it"
        assert reserved in lines
    assert "enable_thinking is set" not in lines


def test_a_template_without_arguments() -> None:
    with pytest.raises(InvalidSettingsError, match=r"it uses no arguments"):
        Renderer(tiny_tokenizer(), arguments={"enable_thinking": False})


def test_arguments_need_a_template() -> None:
    for tokenizer, setting in ((tiny_tokenizer(None), "auto"), (tiny_tokenizer(), "none")):
        with pytest.raises(SimPOError, match=r"a=1.*remove data\.template_args"):
            Encoder(tokenizer, DataConfig(chat_template=setting, template_args={"a": 1}))


def test_one_of_several_templates_may_use_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.chat_template = {"default": CHATML, "tool_use": BARE + "{{ a }}"}
    renderer = Renderer(tokenizer, arguments={"a": "x"})
    assert renderer.variables == {"a"}
    assert renderer.render([Q], [{"function": {}}]) == "user: Why?\nx"
    with pytest.raises(InvalidSettingsError, match="it uses a"):
        Renderer(tokenizer, arguments={"b": "x"})


def test_templates_in_python_get_what_is_set() -> None:
    """What they take is not known before they are called."""
    tokenizer = shipped_tokenizer("deepseek_v32")
    with_thinking, without = (
        Renderer(tokenizer, arguments={"enable_thinking": value}).render([Q], generation=True)
        for value in (True, False)
    )
    assert with_thinking.endswith("<think>")
    assert without.endswith("</think>")


# --- what is passed -------------------------------------------------------------------------------


def test_mlx_lm_passes_whether_the_tokenizer_thinks() -> None:
    assert implied_arguments(template_tokenizer("qwen3")) == {"enable_thinking": True}
    assert implied_arguments(template_tokenizer("llama3")) == {"enable_thinking": False}
    assert implied_arguments(template_tokenizer("qwen3", False)) == {}


@pytest.mark.parametrize("generation", [True, False])
def test_an_argument_of_the_user_wins(generation: bool) -> None:
    seen = []
    tokenizer = tiny_tokenizer("{{ enable_thinking }} {{ level }}")
    assert implied_arguments(tokenizer) == {"enable_thinking": False}
    for arguments in (None, {"enable_thinking": True}, {"level": 3}):
        seen.append(Renderer(tokenizer, arguments=arguments).render([Q], generation=generation))
    assert seen == ["False ", "True ", "False 3"]


def test_arguments_reach_prompts_and_conversations() -> None:
    encoder = Encoder(
        template_tokenizer("qwen3"), DataConfig(template_args={"enable_thinking": False})
    )
    prompt = encoder.tokenizer.decode(encoder.prompt_tokens("Why?"))
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("name", "wrapped", "arguments", "end"),
    [
        ("llama3", True, None, "own"),
        ("qwen3", True, None, ", with enable_thinking=true (mlx-lm's choice for this tokenizer)"),
        ("qwen3", False, None, "own"),
        ("qwen3", True, {"enable_thinking": False}, "own, with enable_thinking=false"),
        (
            "smollm3",
            True,
            {"xml_tools": "x"},
            "own, with enable_thinking=true, xml_tools=x",
        ),
    ],
)
def test_the_origin_names_the_arguments(name: str, wrapped: bool, arguments: Any, end: str) -> None:
    renderer = Renderer(template_tokenizer(name, wrapped), arguments=arguments)
    assert renderer.origin.startswith("the tokenizer's own")
    assert renderer.origin.endswith(end)


def test_other_arguments_for_one_renderer() -> None:
    renderer = Renderer(tiny_tokenizer("{{ a }}{{ b }}"), arguments={"a": 1, "b": 2})
    assert renderer.with_arguments({"b": 3}).render([Q]) == "13"
    assert renderer.render([Q]) == "12"


def test_arguments_as_they_are_typed() -> None:
    arguments = {"a": True, "b": None, "c": "low", "d": 1}
    assert describe_arguments(arguments) == "a=true, b=null, c=low, d=1"


def test_a_tokenizer_may_call_the_argument_otherwise() -> None:
    class Tokenizer:
        has_thinking = True
        _thinking_kwarg = "thinking"

    assert implied_arguments(Tokenizer()) == {"thinking": True}
