"""Where the text of a response begins in a whole conversation as the chat template writes it.

A template may write text of its own between the generation prompt and the response: Qwen3's an
empty think block, GLM's a line break, gpt-oss's the name of a channel. Such text is no preference
of anybody's, and both responses have it: it is not scored. It is told from the response by writing
the conversation again with another response: what comes before the first difference is the
template's.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .render import Renderer
from .rows import InvalidRecordError, Message
from .thinking import (
    Thinking,
    is_unfinished,
    text_in,
    texts_beside_tags,
    thinking_of,
    with_final_text,
    with_text,
    with_thinking,
    without_thinking,
)

# Templates end a turn in one or two ways; one that ends each response differently needs no memory.
MAX_FRAMES = 8
MAX_END = 64  # characters


class Boundary(NamedTuple):
    """How a conversation's text divides.

    unscored: its beginning, up to the first character that is scored. template_text: the end of
    that beginning that comes after the generation prompt and that the template itself writes.
    continues_prompt: the text begins with the prompt as the model will see it.
    """

    unscored: str
    template_text: str
    continues_prompt: bool


class BoundaryFinder:
    """Divides conversations by where the response's own text begins.

    Args:
        renderer: writes the conversations.
        after_thinking: scoring begins after a response's thinking instead of with it.
    """

    def __init__(self, renderer: Renderer, *, after_thinking: bool = False) -> None:
        self._renderer = renderer
        self._after_thinking = after_thinking
        # (what the template writes before a response, and after it), as seen so far: a conversation
        # of that form need not be written again. Threads replace the tuple and never change it.
        self._frames: tuple[tuple[str, str], ...] = ()

    def boundary(
        self,
        prompt: list[Message],
        response: list[Message],
        tools: list | None,
        prompt_text: str,
        text: str,
    ) -> Boundary:
        """Divide one conversation.

        Args:
            prompt, response: its messages; the first of the response is the assistant's.
            prompt_text: the prompt with its generation prompt.
            text: the whole conversation.

        Raises:
            InvalidRecordError: nothing comes after the thinking, though only that is scored; or the
                template loses text beside tags of thinking.
        """
        if self._after_thinking and is_unfinished(response[0]):
            raise InvalidRecordError("empty response", "its thinking has no end")
        if any(part not in text for part in texts_beside_tags(response[0])):
            raise InvalidRecordError(
                "misplaced thinking", "the chat template loses text beside the tags of thinking"
            )
        continues = text.startswith(prompt_text)
        thinking = thinking_of(response[0])
        skips_thinking = self._after_thinking and thinking is not None
        if continues and not skips_thinking:
            before = self._known_frame(response, text[len(prompt_text) :])
            if before is not None:
                return Boundary(prompt_text + before, before, continues)
        rewritten = _Rewritten(self._renderer, prompt, response, tools, prompt_text, text)
        is_template_text = continues
        if thinking is None or not rewritten.writes_thinking(thinking):
            end = rewritten.shared(with_text(response[0], rewritten.mark))
            if continues:
                self._remember(response, rewritten.last, prompt_text, rewritten.mark)
        elif skips_thinking:
            end = rewritten.shared(with_final_text(response[0], thinking, rewritten.mark))
            is_template_text = False
        else:
            end = rewritten.thinking_start(thinking)
        if continues or not end:  # 0: the template rejects every change
            # What the model is prompted with is never scored.
            end = max(end, common_start(text, prompt_text))
        template_text = text[len(prompt_text) : end] if is_template_text else ""
        return Boundary(text[:end], template_text, continues)

    def _known_frame(self, response: list[Message], rest: str) -> str | None:
        """Return what the template writes before the response's text, if this is how it always is.

        ``rest`` is the conversation's text after the generation prompt. It must be the response's
        content between a known beginning and a known end, and nothing else: so a short content is
        never taken for a piece of the template's text.
        """
        content = _only_text(response)
        if content is None:
            return None
        stripped = content.strip()
        for before, after in self._frames:
            length = len(rest) - len(before) - len(after)
            if length not in (len(content), len(stripped)):
                continue
            middle = rest[len(before) : len(before) + length]
            if middle in (content, stripped) and rest.startswith(before) and rest.endswith(after):
                return before
        return None

    def _remember(
        self, response: list[Message], marked: str | None, prompt_text: str, mark: str
    ) -> None:
        """Remember what surrounds the mark in a conversation that was written with it."""
        if marked is None or _only_text(response) is None or len(self._frames) >= MAX_FRAMES:
            return
        before, is_there, after = marked[len(prompt_text) :].partition(mark)
        is_new = (before, after) not in self._frames
        if marked.startswith(prompt_text) and is_there and is_new and len(after) <= MAX_END:
            self._frames = (*self._frames, (before, after))


class _Rewritten:
    """A conversation that is written again with changes to the response's first message.

    mark: a character that occurs nowhere in the conversation. last: the last text that was written,
    or None if the template rejected it.
    """

    def __init__(
        self,
        renderer: Renderer,
        prompt: list[Message],
        response: list[Message],
        tools: list | None,
        prompt_text: str,
        text: str,
    ) -> None:
        self._renderer, self._tools = renderer, tools
        self._prompt, self._response = prompt, response
        self._prompt_text, self._text = prompt_text, text
        self.mark = unused_character(prompt_text + text)
        self.last: str | None = None

    def shared(self, first: Message) -> int:
        """Return how many characters come before the first difference, if the response begins with
        this message; 0 if the template rejects it."""
        self.last = write_again(
            self._renderer, [*self._prompt, first, *self._response[1:]], self._tools
        )
        return 0 if self.last is None else common_start(self._text, self.last)

    def writes_thinking(self, thinking: Thinking) -> bool:
        """Return whether the template writes the first message's thinking."""
        self.shared(with_thinking(self._response[0], thinking, self.mark))
        return self.last is None or self.mark in self.last

    def thinking_start(self, thinking: Thinking) -> int:
        """Return where the first message's thinking begins, with its tag."""
        first = self._response[0]
        shared = self.shared(without_thinking(first, self.mark))
        rest, content = self._text[shared:], text_in(first)
        if not thinking.keys and rest.startswith((content, content.strip())):
            return shared  # to the template, it is text like any other
        # Else the template writes the tags, and white space before them.
        start = len(self._prompt_text)
        if not self._text.startswith(self._prompt_text):
            # The prompt is written differently; but its end, the header, is probably there.
            bare = write_again(self._renderer, self._prompt, self._tools) or ""
            header = self._prompt_text[common_start(bare, self._prompt_text) :]
            header_start = self._text.rfind(header, 0, shared) if header else -1
            start = shared if header_start < 0 else header_start + len(header)
        while start < shared and self._text[start].isspace():
            start += 1
        return start


def write_again(renderer: Renderer, messages: list[Message], tools: list | None) -> str | None:
    """Return a changed conversation's text, or None if the template rejects the change."""
    try:
        return renderer.render(messages, tools)
    except InvalidRecordError:
        return None


def common_start(a: str, b: str) -> int:
    """Return the length of the longest beginning that two texts share."""
    if b.startswith(a) or a.startswith(b):
        return min(len(a), len(b))
    low, high = 0, min(len(a), len(b))  # a[:low] is shared, a[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle
    return low


def unused_character(text: str) -> str:
    """Return a character that ``text`` does not have: one that Unicode leaves to private use."""
    # The default only so that a text with all of these 65 534 characters cannot end a run.
    return next((c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in text), "\0")


def _only_text(response: Sequence[Message]) -> str | None:
    """Return the content of a response that is one message of text, else None."""
    content = response[0].get("content")
    is_text = len(response) == 1 and isinstance(content, str) and content
    return content if is_text and not response[0].get("tool_calls") else None
