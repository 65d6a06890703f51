"""A conversation with a model, which reads only what is new in each turn."""

from collections.abc import Callable, Iterator
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from ..data.encode import common_prefix
from ..data.rows import Message
from ..errors import SimPOError
from .generate import Part, draw_seed, stream_response
from .prompts import NamedPrompt, check_against_model, check_system_prompt, prompt_tokens
from .responder import Responder
from .settings import LARGEST_SEED, SamplingSettings


class _StoppedError(Exception):
    """The user has stopped a response before its first token."""


class Chat:
    """A conversation of several turns with a base model or its adapter.

    Each response is the one that the model would give to the whole conversation; keys and values of
    the tokens that it has read already are used again.

    Attributes:
        messages: the conversation so far, with the system turn.
        uses_adapter: whether the adapter responds.

    Raises:
        SimPOError: the settings or the system prompt cannot be used, or there is no chat template.
    """

    def __init__(
        self, responder: Responder, settings: SamplingSettings, system_prompt: str | None = None
    ) -> None:
        """See the class; raises SimPOError."""
        settings.check()
        encoder = responder.encoder
        if encoder.renderer.is_plain_text:
            raise SimPOError(
                f"a chat needs a chat template, and the one in use is {encoder.renderer.origin}; "
                "use --prompt, or set data.chat_template to a template file"
            )
        if system_prompt is not None:
            check_system_prompt(encoder, system_prompt)
        self._responder = responder
        self._settings = settings
        self._system_prompt = system_prompt
        self._turns = 0
        self.uses_adapter = responder.switch is not None
        self._use()
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        text = self._system_prompt
        self.messages: list[Message] = [{"role": "system", "content": text}] if text else []
        self._turns = 0

    def toggle_adapter(self) -> None:
        """Let the base model respond from now on, or the adapter again.

        Raises:
            SimPOError: there is no adapter.
        """
        if self._responder.switch is None:
            raise SimPOError("there is no adapter; start with --adapter to compare with one")
        self.uses_adapter = not self.uses_adapter
        self._use()

    def _use(self) -> None:
        self._responder.use("adapter" if self.uses_adapter else "base")
        self._forget()  # the other one's keys and values differ

    def _forget(self) -> None:
        self._cache: list[Any] = make_prompt_cache(self._responder.model)
        self._read: list[int] = []  # the tokens whose keys and values are in the cache

    def send(self, text: str, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Part]:
        """Yield the response to a message, one part per token.

        Args:
            should_stop: asked after each token; a response that is stopped stays in the
                conversation as far as it came, and has no last part.

        Raises:
            SimPOError: the message is empty, or the template rejects it; the conversation stays as
                it was before.
        """
        prompt: list[Message] = [*self.messages, {"role": "user", "content": text}]
        tokens = prompt_tokens(self._responder.encoder, NamedPrompt(prompt, "the message"))
        check_against_model(tokens, self._settings, self._responder.model)
        response, is_whole = "", False
        try:
            for part in self._stream(tokens, should_stop):
                response += part.text
                is_whole = part.response is not None
                yield part
        finally:
            if response or is_whole:
                self.messages = [*prompt, {"role": "assistant", "content": response}]
                self._turns += 1

    def _stream(self, tokens: list[int], should_stop: Callable[[], bool]) -> Iterator[Part]:
        seed = self._settings.seed
        # Another one in each turn: the same question twice may have two responses.
        seed = draw_seed() if seed is None else (seed + self._turns) % (LARGEST_SEED + 1)

        def progress(done: int, total: int) -> None:
            """Raise _StoppedError between two parts of a long prompt."""
            if done < total and should_stop():
                raise _StoppedError

        unread = self._unread(tokens)
        # Until the response begins, nobody can say how much of the prompt has been read.
        cache = self._cache
        try:
            for part in stream_response(
                self._responder.model,
                self._responder.tokenizer,
                unread,
                self._settings,
                seed=seed,
                prompt_cache=cache,
                progress=progress,
            ):
                self._read += [*unread, part.token]
                unread = []
                yield part
                if part.response is None and should_stop():
                    return
        except _StoppedError:
            self._forget()
        except BaseException:
            self._forget()
            raise

    def _unread(self, tokens: list[int]) -> list[int]:
        """Return the end of ``tokens`` that is not in the cache, and remove all else from it.

        A template may write earlier turns differently than before (without their thinking, say), so
        that only a common beginning counts. At least one token is read again: its logits are where
        the response begins.
        """
        shared = min(common_prefix(self._read, tokens), len(tokens) - 1)
        excess = len(self._read) - shared
        if excess and not self._trim(excess):
            self._forget()
            return tokens
        del self._read[shared:]
        return tokens[shared:]

    def _trim(self, count: int) -> bool:
        """Remove the last ``count`` tokens from the cache; return whether that was possible.

        Recurrent layers cannot forget, and a window of the last tokens has lost the earlier ones.
        """
        # Not trim_prompt_cache, which says only how many tokens its first layer has removed.
        return can_trim_prompt_cache(self._cache) and all(
            layer.trim(count) == count for layer in self._cache
        )
