"""``compat: official``: the tokens of the authors' code, reproduced token by token.

Source: princeton-nlp/SimPO, scripts/run_simpo.py (apply_chat_template) and
scripts/simpo_trainer.py (build_tokenized_answer, tokenize_row), and alignment-handbook's
maybe_insert_system_message. It differs from this package's own rules (see `encode`):
- Prompt and responses are templated separately and without a generation prompt. So the assistant's
  header is scored, and with it a default system turn that the template writes before it.
- Where the template mentions "system" or "<|im_start|>", an empty system message is put first.
- A BOS text at the start of a response is removed. A BOS token is put before each prompt and an EOS
  token after each response, even after an end-of-turn token and a newline.
- When prompt and longer response are too long together, the prompt keeps its last
  max_prompt_length tokens; if that is not enough, each response keeps its first
  max_length − max_prompt_length tokens, however short the prompt is.
The authors also replace the template of models called "mistral". That is not repeated here: their
recipe in configs/ gives that template as ``chat_template``.
"""

from typing import Any, NamedTuple

from .records import Pair
from .render import Renderer, token_ids
from .rows import InvalidRecordError, Message


class OfficialTokens(NamedTuple):
    """The tokens of a pair.

    sequences: (tokens, score_start) of chosen and rejected.
    cuts: (prompt tokens, response tokens) that were cut.
    boundary_tokens: prompt tokens that became part of a response.
    """

    sequences: tuple[tuple[list[int], int], tuple[list[int], int]]
    cuts: tuple[int, int]
    boundary_tokens: int


def official_tokens(
    tokenizer: Any, renderer: Renderer, pair: Pair, *, max_length: int, max_prompt_length: int
) -> OfficialTokens:
    """Encode one pair as tokenize_row does.

    Raises:
        InvalidRecordError: the template rejects it, or the official code's checks fail.
    """
    prompt_text, *texts = official_texts(renderer, tokenizer, pair)
    parts = [split_response(tokenizer, prompt_text, text) for text in texts]
    (chosen_prompt, _), (rejected_prompt, _) = parts
    differing = sum(a != b for a, b in zip(chosen_prompt, rejected_prompt, strict=False))
    if differing > 1 or abs(len(chosen_prompt) - len(rejected_prompt)) > 1:
        raise InvalidRecordError(
            "fails the official code's check", "the prompts differ by more than their last token"
        )
    num_prompt_tokens = len(token_ids(tokenizer, prompt_text))
    boundary_tokens = num_prompt_tokens - min(len(chosen_prompt), len(rejected_prompt))

    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    parts = [(p if p[:1] == bos else bos + p, r if r[-1:] == eos else r + eos) for p, r in parts]
    longest_response = max(len(response) for _, response in parts)
    cut_prompt = cut_response = 0
    sequences = []
    for prompt, response in parts:
        if len(prompt) + longest_response > max_length:
            cut_prompt = max(cut_prompt, len(prompt) - max_prompt_length)
            prompt = prompt[-max_prompt_length:]
        if len(prompt) + longest_response > max_length:
            cut_response += max(0, len(response) - (max_length - max_prompt_length))
            response = response[: max_length - max_prompt_length]
        sequences.append((prompt + response, len(prompt)))
    cuts = (max(0, cut_prompt), cut_response)
    return OfficialTokens((sequences[0], sequences[1]), cuts, max(0, boundary_tokens))


def official_texts(renderer: Renderer, tokenizer: Any, pair: Pair) -> tuple[str, str, str]:
    """Return the texts of prompt, chosen and rejected, each templated by itself.

    Raises:
        InvalidRecordError: the template rejects one of them.
    """
    prompt, chosen, rejected = renderer.conversation(pair)
    if pair.has_full_conversations:
        # The official prompt is all but the last turn of the chosen conversation.
        prompt, chosen, rejected = prompt + chosen[:-1], chosen[-1:], rejected[-1:]
    template = renderer.text or ""
    mentions_system = "system" in template or "<|im_start|>" in template
    if prompt and prompt[0]["role"] != "system" and mentions_system:
        empty: Message = {"role": "system", "content": ""}
        prompt = [empty, *prompt]
    chosen_text, rejected_text = (
        renderer.render(response).removeprefix(tokenizer.bos_token)
        for response in (chosen, rejected)
    )
    return renderer.render(prompt), chosen_text, rejected_text


def split_response(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Tokenize prompt + response in one piece and return (prompt tokens, response tokens).

    Where the tokens of the prompt alone are not a prefix of the whole, the boundary moves back by
    one token (build_tokenized_answer).

    Raises:
        InvalidRecordError: the whole has fewer tokens than the prompt alone.
    """
    prompt_ids, whole = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + response)
    if len(whole) < len(prompt_ids):
        raise InvalidRecordError(
            "fails the official code's check",
            "prompt and response together have fewer tokens than the prompt alone",
        )
    is_prefix = whole[: len(prompt_ids)] == prompt_ids
    start = len(prompt_ids) if is_prefix else len(prompt_ids) - 1
    return whole[:start], whole[start:]
