"""Reference implementation that the parity tests compare the library against.

Everything here is written from the specification, with torch and transformers only
and without sight of the library's own code. It favours plainness over speed.

* ``encode_default`` follows the library's documented tokenization rules.
* ``encode_official`` follows the rules of the authors' training script
  (princeton-nlp/SimPO: ``apply_chat_template`` and ``tokenize_row``).
* ``average_logps`` and ``simpo_loss`` are the quantities SimPO optimizes.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Tokenizer = PreTrainedTokenizerFast
Messages = list[dict[str, Any]]
Record = Mapping[str, Any]

SIDES = ("chosen", "rejected")


class TokenizedSequence(NamedTuple):
    """A tokenized preference pair; each sequence is scored from its start index on."""

    chosen: list[int]
    chosen_start: int
    rejected: list[int]
    rejected_start: int


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize ``text`` exactly as it stands, without special tokens at either end."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _turns(value: str | Sequence[dict[str, Any]], role: str) -> Messages:
    """Return a list of messages as it is, and a string as one message of ``role``."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [dict(message) for message in value]


def _require_eos(tokenizer: Tokenizer) -> int:
    """Return the tokenizer's EOS id.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("an EOS token has to be appended; the tokenizer has none")
    return tokenizer.eos_token_id


def _automatic_bos(tokenizer: Tokenizer) -> int | None:
    """Return the BOS id if the tokenizer puts one in front of a text, else None."""
    bos = tokenizer.bos_token_id
    return bos if tokenizer("a")["input_ids"][:1] == [bos] else None


def _end_of_turn_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids that can end a turn: EOS, named special tokens, special added tokens."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}


def _plain_text(tokenizer: Tokenizer, record: Record) -> list[list[int]]:
    """Return the ids of the prompt and of the prompt with each response, without a template."""
    eos = _require_eos(tokenizer)
    sequences = [_encode(tokenizer, record["prompt"])]
    for side in SIDES:
        ids = _encode(tokenizer, record["prompt"] + record[side])
        already_ended = record[side] != "" and ids[-1:] == [eos]
        sequences.append(ids if already_ended else [*ids, eos])
    return sequences


def _close_turn(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize a templated conversation so that it ends with an end-of-turn token."""
    closing = _end_of_turn_ids(tokenizer)
    whole, bare = _encode(tokenizer, text), _encode(tokenizer, text.rstrip())
    for ids in (whole, bare):
        if ids and ids[-1] in closing:
            return ids
    # No end-of-turn token: trailing white space is then kept as the template's text.
    return [*whole, _require_eos(tokenizer)]


def _conversation(tokenizer: Tokenizer, record: Record) -> list[list[int]]:
    """Return the ids of the prompt, with generation prompt, and of both whole conversations."""
    prompt = _turns(record["prompt"], "user")
    prompt_text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    texts = [
        tokenizer.apply_chat_template(prompt + _turns(record[side], "assistant"), tokenize=False)
        for side in SIDES
    ]
    closed = [_close_turn(tokenizer, text) for text in texts]
    return [_encode(tokenizer, prompt_text), *closed]


def _common_prefix(*sequences: list[int]) -> int:
    """Return how many leading tokens all ``sequences`` share."""
    columns = zip(*sequences, strict=False)
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def _cut_prompt(prompt: list[int], length: int, bos: int | None) -> list[int]:
    """Keep the last ``length`` prompt tokens; a leading BOS, whoever wrote it, is one of them."""
    if length >= len(prompt):
        return prompt
    if bos is not None and prompt[0] == bos:
        return [bos, *prompt[len(prompt) - max(length - 1, 0) :]]
    return prompt[len(prompt) - length :]


def encode_default(
    tokenizer: Tokenizer, record: Record, max_length: int, max_prompt_length: int
) -> TokenizedSequence | None:
    """Tokenize a pair by the library's documented rules.

    The three texts (prompt with generation prompt, both whole conversations) are
    tokenized on their own; scoring starts where the first of them departs from the
    others. None if either response has no scored token. For templates that write nothing
    of their own between the generation prompt and a response.
    """
    is_text = all(isinstance(record[key], str) for key in ("prompt", *SIDES))
    plain = is_text and not tokenizer.chat_template
    sequences = (_plain_text if plain else _conversation)(tokenizer, record)

    bos = _automatic_bos(tokenizer)
    prompt, chosen, rejected = (
        ids if bos is None or ids[:1] == [bos] else [bos, *ids] for ids in sequences
    )

    boundary = _common_prefix(prompt, chosen, rejected)
    head, tails = chosen[:boundary], (chosen[boundary:], rejected[boundary:])
    excess = boundary + max(map(len, tails)) - max_length
    if excess > 0:
        keep = max(boundary - excess, max_prompt_length)
        head = _cut_prompt(head, keep, tokenizer.bos_token_id)
        room = max(max_length - len(head), 0)
        tails = (tails[0][:room], tails[1][:room])

    # Nothing predicts the first token, so it is never scored, even without a head.
    start = max(len(head), 1)
    chosen, rejected = head + tails[0], head + tails[1]
    if min(len(chosen), len(rejected)) <= start:
        return None
    return TokenizedSequence(chosen, start, rejected, start)


def _official_texts(tokenizer: Tokenizer, record: Record) -> tuple[str, str, str]:
    """Apply the template to prompt and responses separately, as the authors' script does."""
    prompt = _turns(record["prompt"], "user")
    template = tokenizer.get_chat_template()
    mentions_system = "system" in template or "<|im_start|>" in template
    if prompt[0]["role"] != "system" and mentions_system:
        prompt = [{"role": "system", "content": ""}, *prompt]
    chosen, rejected = (
        tokenizer.apply_chat_template(
            _turns(record[side], "assistant"), tokenize=False
        ).removeprefix(tokenizer.bos_token)
        for side in SIDES
    )
    return tokenizer.apply_chat_template(prompt, tokenize=False), chosen, rejected


def _official_split(
    tokenizer: Tokenizer, prompt: str, response: str
) -> tuple[list[int], list[int]]:
    """Tokenize prompt + response and split; a merged last prompt token is scored.

    Raises:
        ValueError: the two have fewer tokens than the prompt alone.
    """
    alone = _encode(tokenizer, prompt)
    whole = _encode(tokenizer, prompt + response)
    if len(whole) < len(alone):
        raise ValueError("prompt + response has fewer tokens than the prompt alone")
    split = len(alone)
    if whole[:split] != alone:
        split -= 1
    return whole[:split], whole[split:]


def encode_official(
    tokenizer: Tokenizer, record: Record, max_length: int, max_prompt_length: int
) -> TokenizedSequence:
    """Tokenize a pair by the rules of princeton-nlp/SimPO (truncation keep_end).

    Raises ValueError where the authors' code cannot run: without a BOS or EOS token,
    without a chat template, or when the two prompt parts differ in several tokens.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise ValueError("the official code needs a tokenizer with BOS and EOS tokens")
    prompt_text, *response_texts = _official_texts(tokenizer, record)
    pairs = [_official_split(tokenizer, prompt_text, text) for text in response_texts]

    heads = [head for head, _ in pairs]
    differing = sum(a != b for a, b in zip(*heads, strict=False))
    if differing > 1 or abs(len(heads[0]) - len(heads[1])) > 1:
        raise ValueError("the two prompt parts differ in more than the last token")

    pairs = [
        (
            head if head[:1] == [bos] else [bos, *head],
            tail if tail[-1:] == [eos] else [*tail, eos],
        )
        for head, tail in pairs
    ]
    # Both conditions use the longer response's full length, for the shorter one as well.
    longer = max(len(tail) for _, tail in pairs)
    sides: list[tuple[list[int], int]] = []
    for head, tail in pairs:
        if len(head) + longer > max_length:
            head = head[-max_prompt_length:]
        if len(head) + longer > max_length:
            tail = tail[: max_length - max_prompt_length]
        sides.append((head + tail, len(head)))
    return TokenizedSequence(*sides[0], *sides[1])


def average_logps(
    model: PreTrainedModel, rows: list[tuple[list[int], int]], batch_size: int
) -> torch.Tensor:
    """Return the mean log-probability of each row's scored tokens: float32, shape (rows,).

    A row is (token ids, index of the first scored token). The caller chooses train or eval
    mode and gradient tracking; the result is differentiable.

    Raises:
        ValueError: a row without a scored token, or one that is scored from its first token on.
    """
    if any(not 1 <= start < len(ids) for ids, start in rows):
        raise ValueError("a row needs 1 <= start < number of tokens")
    means = [torch.empty(0, device=model.device)]
    for first in range(0, len(rows), batch_size):
        ids, starts = zip(*rows[first : first + batch_size], strict=True)
        tokens = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        index = torch.arange(tokens.shape[1])
        real = index < torch.tensor([[len(row)] for row in ids])
        loss_mask = real & (index >= torch.tensor(starts)[:, None])
        tokens, real, loss_mask = (x.to(model.device) for x in (tokens, real, loss_mask))
        logits = model(tokens, attention_mask=real.long(), use_cache=False).logits
        # Position t - 1 predicts token t.
        logps = F.log_softmax(logits[:, :-1].float(), dim=-1)
        logps = logps.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        logps = logps.masked_fill(~loss_mask[:, 1:], 0.0)
        means.append(logps.sum(-1) / loss_mask.sum(-1))
    return torch.cat(means)


def simpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> torch.Tensor:
    """Return the mean SimPO loss of average log-probabilities; hinge ignores label smoothing.

    Raises:
        ValueError: another loss type than sigmoid and hinge.
    """
    margin = beta * (chosen - rejected - gamma_beta_ratio)
    if loss_type == "sigmoid":
        right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
        return -((1 - label_smoothing) * right + label_smoothing * wrong).mean()
    if loss_type == "hinge":
        return F.relu(1 - margin).mean()
    raise ValueError(f"unknown loss type: {loss_type!r}")
