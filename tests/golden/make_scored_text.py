"""Writes scored_text.md: what is scored of some pairs with the chat templates of well-known models.

    PYTHONPATH=.:tests python -m golden.make_scored_text

A person reads the file; tests/data/test_scored_text.py compares it. Between ⟦ and ⟧ is what is
scored. ¦ is where the prompt ends that the model is asked with: text after it is the template's.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from helpers.chat_templates import TEMPLATES, shipped_tokenizer, template_tokenizer
from helpers.tiny import assistant, system, user

from mlx_simpo import DataConfig
from mlx_simpo.data.dropped import Dropped
from mlx_simpo.data.encode import EncodedPair, Encoder
from mlx_simpo.data.records import InvalidRecordError, Pair

FILE = Path(__file__).with_name("scored_text.md")
INTRODUCTION = """\
# What is scored, template by template

Written by `python -m golden.make_scored_text`. Between ⟦ and ⟧ is what is scored; ↵ is a line
break; ¦ is the end of the prompt that `evaluate` and `generate` give to the model. Text between ¦
and ⟦ is what the template itself writes. "after thinking" is `data.score=after_thinking`, where it
differs.
"""
Q = user("Why?")
ARGUMENTS = {"place": "here"}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "sky",
            "description": "Its colour.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]


def call(arguments: Any, content: str | None = "") -> dict[str, Any]:
    function = {"name": "sky", "arguments": arguments}
    calls = [{"id": "123456789", "type": "function", "function": function}]
    return assistant(content, tool_calls=calls)


def pairs(template: str) -> dict[str, Pair]:
    """Return the pairs by what is special about them."""
    # DeepSeek's template takes a call's arguments as JSON text only.
    arguments: Any = json.dumps(ARGUMENTS) if template == "deepseek_r1" else ARGUMENTS
    tool = {"role": "tool", "content": "blue", "tool_call_id": "123456789"}
    because, no = [assistant("Because.")], [assistant("No")]
    inline = "<think>\nLet me see.\n</think>\n\nBecause."
    return {
        "plain": Pair("Why?", "Because.", "No"),
        "white space": Pair("Why?", "\n Because.\n", "No "),
        "system text": Pair([system("Be kind."), Q], because, no),
        "several turns": Pair([Q, *no, user("And?")], because, [assistant("Never.")]),
        "thinking in a key": Pair(
            [Q],
            [assistant("Because.", reasoning_content="Let me see.")],
            [assistant("No", reasoning_content="Well")],
        ),
        "thinking in the content": Pair(
            [Q], [assistant(inline)], [assistant("<think>\nWell\n</think>\n\nNo")]
        ),
        "thinking in one response": Pair([Q], [assistant(inline)], no),
        "an empty think block in the content": Pair(
            [Q], [assistant("<think>\n\n</think>\n\nBecause.")], no
        ),
        "a tool call, or text": Pair([Q], [call(arguments)], no, tools=TOOLS),
        "after a tool call": Pair([Q, call(arguments), tool], because, no, tools=TOOLS),
        "tool call without content": Pair([Q, call(arguments, None), tool], because, no),
    }


def lines_of(template: str, arguments: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one template."""
    name = " ".join([template, *(f"{key}={str(v).lower()}" for key, v in arguments.items())])
    yield f"\n## {name}\n"
    load = template_tokenizer if template in TEMPLATES else shipped_tokenizer
    tokenizer = load(template)
    encoder = Encoder(tokenizer, DataConfig(template_args=arguments or None))
    after = Encoder(tokenizer, DataConfig(template_args=arguments or None, score="after_thinking"))
    for title, pair in pairs(template).items():
        yield f"### {title}\n"
        yield "```"
        try:
            encoded = encoder.encode(pair)
        except InvalidRecordError as error:
            yield f"quarantined: {': '.join(error.args)}"
        else:
            prompt = tokenizer.decode(encoder.prompt_tokens(pair.prompt, pair.tools))
            yield from side_lines(tokenizer, prompt, encoded)
            later = after.encode(pair)
            if starts(later) != starts(encoded):
                yield "after thinking:"
                yield from side_lines(tokenizer, prompt, later)
            yield from dropped_lines(prompt, Dropped(encoded.dropped))
        yield "```\n"


def starts(pair: EncodedPair) -> tuple[int, int]:
    return pair.chosen.score_start, pair.rejected.score_start


def side_lines(tokenizer: Any, prompt: str, encoded: EncodedPair) -> Iterator[str]:
    """Yield what comes before the scored text of both sides, once if it is the same, and this."""
    before = ""
    for name in ("chosen", "rejected"):
        sequence = getattr(encoded, name)
        unscored, response = (
            tokenizer.decode(part.tolist())
            for part in np.split(sequence.tokens, [sequence.score_start])
        )
        if unscored != before:
            is_continued = unscored.startswith(prompt)
            mark = f"{prompt}¦{unscored.removeprefix(prompt)}" if is_continued else unscored
            yield f"          {visible(mark)}"
        before = unscored
        yield f"{name:<9} ⟦{visible(response)}⟧"


def dropped_lines(prompt: str, dropped: Dropped) -> Iterator[str]:
    if dropped:
        names = [str(flag.name).lower().replace("_", " ") for flag in dropped]
        yield f"dropped: {', '.join(names)}"
    if Dropped.PROMPT in dropped:
        yield f"asked with: {visible(prompt)}"


def visible(text: str) -> str:
    return text.replace("\n", "↵")


def content_of_file() -> str:
    """Return the file's content."""
    variants: list[tuple[str, dict[str, Any]]] = []
    for template in [*TEMPLATES, "deepseek_v32"]:
        variants.append((template, {}))
        if template in ("qwen3", "qwen3_5", "smollm3", "glm4_5"):
            variants.append((template, {"enable_thinking": False}))
    lines = [line for template, arguments in variants for line in lines_of(template, arguments)]
    return INTRODUCTION + "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(content_of_file(), encoding="utf-8")
