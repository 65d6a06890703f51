"""Prompts as words, for comparing them: what differs in case, white space or punctuation is equal.

Compared are the turns of the user: a system prompt that a whole dataset shares says nothing about
whether two questions are the same. Only a user who says next to nothing ("Continue.") is compared
together with everything before.
"""

import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from .messages import text_of
from .rows import Message

# With fewer words of the user ("Hi", "Go on, please"), two prompts are the same only if the whole
# conversations are.
MIN_USER_WORDS = 5
# "7 - 8" and "7 * 8" are different questions; a hyphen between words is punctuation. A sign counts
# between digits, brackets and variables of one letter.
_SIGN = re.compile(r"(?<=[\d)])\s*([-*/%])\s*(?=[a-z]\b|[\d(])|(?<=\b[a-z])\s*([-*/%])\s*(?=[\d(])")
_SIGN_WORDS = {"-": " minus ", "*": " times ", "/": " over ", "%": " mod "}
# Chinese and Japanese characters, and Thai ones, are written without spaces between words.
_WITHOUT_SPACES = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")

_ADVANCE = 1000
# Marks before and after the words of a turn; a word's hash is one of them as rarely as another's.
_BEGINS, _ENDS = (1, 1), (2, 2)


class _Separators(dict[int, str]):
    """For str.translate: what becomes of each character, computed when it first occurs."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)
        if kind[0] == "S" or _WITHOUT_SPACES.match(character):  # "+", "=" and "€" are words, too
            self[code] = f" {character} "
        else:  # P: punctuation, Z: white space, C: controls
            self[code] = " " if kind[0] in "PZC" else character
        return self[code]


_SEPARATORS = _Separators()


def words_of(text: str) -> list[bytes]:
    """Return the words of a text, in UTF-8, without case, punctuation and Unicode's variants.

    Two texts are the same after normalization if their words are.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = _SIGN.sub(lambda match: _SIGN_WORDS[match[1] or match[2]], text.casefold())
    return text.translate(_SEPARATORS).encode("utf-8", "surrogatepass").split()


class Spans(NamedTuple):
    """Pieces of an array of words: words[starts[i]:ends[i]]."""

    starts: np.ndarray
    ends: np.ndarray

    def take(self, rows: np.ndarray | slice) -> "Spans":
        """Return the spans of these rows."""
        return Spans(self.starts[rows], self.ends[rows])


@dataclass(frozen=True)
class PromptWords:
    """The words of N prompts, one after the other: the user's, or all if those are too few.

    Attributes:
        words: uint32 [total], a hash per word, and two marks before and after each turn.
        spans: where the words of each prompt are, from its first word to its last.
        last_turns: int64 [N], where the last turn of each prompt begins in ``words``.
        keys: 16 bytes [N], equal for prompts that are the same after normalization.
        conversations: 16 bytes [N], equal if all turns of all roles are the same, too.
    """

    words: np.ndarray
    spans: Spans
    last_turns: np.ndarray
    keys: np.ndarray
    conversations: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


def read_words(
    prompts: Iterable[bytes], advance: Callable[[int], Any] = lambda prompts: None
) -> PromptWords:
    """Return the words of prompts that are stored as `pairs.prompt_text` writes them.

    About 4 bytes per word and 72 per prompt are held in memory.

    Args:
        advance: called now and then with the number of prompts that were read since the last call.
    """
    words, starts, ends, last_turns = array("I"), array("q"), array("q"), array("q")
    keys, conversations = bytearray(), bytearray()
    for number, prompt in enumerate(prompts, start=1):
        if number % _ADVANCE == 0:
            advance(_ADVANCE)
        messages = json.loads(prompt)
        turns = [(message.get("role"), words_of(_content(message))) for message in messages]
        compared = [turn for role, turn in turns if role == "user"]
        conversation = b"\n".join(b"%a:%b" % (role, b" ".join(turn)) for role, turn in turns)
        conversations += blake2b(conversation, digest_size=16).digest()
        if sum(map(len, compared)) < MIN_USER_WORDS:
            keys += conversations[-16:]
            compared = [turn for _, turn in turns] or [[]]
        else:
            text = b"\n".join(map(b" ".join, compared))
            keys += blake2b(text, digest_size=16).digest()
        starts.append(len(words) + len(_BEGINS))
        for turn in compared:
            words.extend((*_BEGINS, *map(crc32, turn), *_ENDS))
        last_turns.append(len(words) - len(_ENDS) - len(compared[-1]))
        ends.append(len(words) - len(_ENDS))
    return PromptWords(
        np.frombuffer(words, np.uint32),
        Spans(np.frombuffer(starts, np.int64), np.frombuffer(ends, np.int64)),
        np.frombuffer(last_turns, np.int64),
        np.frombuffer(keys, "S16"),
        np.frombuffer(conversations, "S16"),
    )


def user_text(messages: Sequence[Message]) -> str:
    """Return the last turn of the user in a prompt; of any role if there is none."""
    turns = [message for message in messages if message.get("role") == "user"] or messages
    return _content(turns[-1]) if turns else ""


def _content(message: Message) -> str:
    """Return a message's text; of a turn that only calls tools, the calls."""
    calls: Any = message.get("tool_calls")
    return text_of(message.get("content")) or (json.dumps(calls) if calls else "")


def join_words(parts: Sequence[PromptWords]) -> PromptWords:
    """Return the prompts of all parts as one."""
    sizes = np.cumsum([0, *(len(part.words) for part in parts)])
    shifted = [(part, size) for part, size in zip(parts, sizes, strict=False)]
    return PromptWords(
        np.concatenate([part.words for part in parts]),
        Spans(
            np.concatenate([part.spans.starts + size for part, size in shifted]),
            np.concatenate([part.spans.ends + size for part, size in shifted]),
        ),
        np.concatenate([part.last_turns + size for part, size in shifted]),
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.conversations for part in parts]),
    )
