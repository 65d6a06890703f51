"""``compat: official``: tokens as the authors' code makes them, token for token.

Source: princeton-nlp/SimPO, scripts/run_simpo.py (apply_chat_template) and
scripts/simpo_trainer.py (build_tokenized_answer, tokenize_row), and alignment-handbook's
maybe_insert_system_message. How it differs from this package's own rules:
- prompt and answers are templated separately and without a generation prompt: the assistant's
  header is scored, and so is a system turn that the template puts before it by default;
- an empty system message is put first where the template mentions "system" or "<|im_start|>";
- a BOS text at the start of an answer is taken off, a BOS token put before each prompt, an EOS
  token after each answer, also behind an end-of-turn token and a newline;
- when prompt and answer are too long together, the prompt keeps its last max_prompt_length tokens,
  then each answer its first max_length − max_prompt_length, however short the prompt is.
The authors' exchange of the template for models called "mistral" is not repeated here: their
recipe's file in configs/ gives that template as ``chat_template``.
"""

from typing import Any, NamedTuple

from .records import InvalidRecordError, Message, Pair
from .render import Renderer, token_ids


class OfficialTokens(NamedTuple):
    """sides: (tokens, start) of chosen and rejected; cuts: (prompt, answer) tokens cut away."""

    sides: tuple[tuple[list[int], int], tuple[list[int], int]]
    cuts: tuple[int, int]
    boundary_tokens: int


def official_tokens(
    tokenizer: Any, renderer: Renderer, pair: Pair, *, max_length: int, max_prompt_length: int
) -> OfficialTokens:
    """The official tokens of one pair.

    Raises:
        Refused: the template or the official checks refuse the pair.
    """
    prompt, *texts = official_texts(renderer, tokenizer, pair)
    sides = [split_answer(tokenizer, prompt, text) for text in texts]
    (first, _), (second, _) = sides
    differing = sum(a != b for a, b in zip(first, second, strict=False))
    if differing > 1 or abs(len(first) - len(second)) > 1:
        raise InvalidRecordError(
            "official check fails", "prompts differ by more than their last token"
        )
    moved = len(token_ids(tokenizer, prompt)) - min(len(first), len(second))

    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    sides = [(p if p[:1] == bos else bos + p, a if a[-1:] == eos else a + eos) for p, a in sides]
    longest = max(len(answer) for _, answer in sides)
    cut_prompt = cut_response = 0
    kept = []
    for before, answer in sides:
        if len(before) + longest > max_length:
            cut_prompt = max(cut_prompt, len(before) - max_prompt_length)
            before = before[-max_prompt_length:]
        if len(before) + longest > max_length:
            cut_response += max(0, len(answer) - (max_length - max_prompt_length))
            answer = answer[: max_length - max_prompt_length]
        kept.append((before + answer, len(before)))
    return OfficialTokens((kept[0], kept[1]), (max(0, cut_prompt), cut_response), moved)


def official_texts(renderer: Renderer, tokenizer: Any, pair: Pair) -> tuple[str, str, str]:
    """Prompt, chosen and rejected, each templated by itself."""
    prompt, chosen, rejected = renderer.conversation(pair)
    if pair.whole:  # all but the last turn of the chosen conversation is the prompt
        prompt, chosen, rejected = prompt + chosen[:-1], chosen[-1:], rejected[-1:]
    template = renderer.text or ""
    mentions_system = "system" in template or "<|im_start|>" in template
    if prompt and prompt[0]["role"] != "system" and mentions_system:
        empty: Message = {"role": "system", "content": ""}
        prompt = [empty, *prompt]
    first, second = (
        renderer.render(answer).removeprefix(tokenizer.bos_token) for answer in (chosen, rejected)
    )
    return renderer.render(prompt), first, second


def split_answer(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(prompt tokens, answer tokens) of prompt + answer tokenized in one piece.

    Where the prompt's own tokens are no prefix of the whole, the boundary goes one token back.
    """
    before, whole = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + answer)
    if len(whole) < len(before):
        raise InvalidRecordError(
            "official check fails", "prompt and answer have fewer tokens than the prompt"
        )
    start = len(before) if whole[: len(before)] == before else len(before) - 1
    return whole[:start], whole[start:]
