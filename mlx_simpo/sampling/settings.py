"""How a response is sampled: its length, the temperature, which tokens may be drawn, the seed.

Nothing here imports MLX, so that the command line can check its options before it loads anything.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from ..config.schema import Rule
from ..config.value_types import describe, is_of_type
from ..errors import InvalidSettingsError

LARGEST_SEED = 2**32 - 1
# Outside these, float32 has no logits left to tell tokens apart by.
COLDEST, HOTTEST = 0.01, 100.0
# Of a response that a person reads to its end; aligned models seldom write more.
MAX_TOKENS = 512

_RULES: dict[str, tuple[type, Rule]] = {
    "max_tokens": (int, Rule("1 or greater", lambda v: v >= 1)),
    "temperature": (
        float,
        Rule(
            f"0 for greedy decoding, or from {COLDEST:g} to {HOTTEST:g}",
            lambda v: v == 0 or COLDEST <= v <= HOTTEST,
        ),
    ),
    "top_p": (float, Rule("greater than 0 and at most 1", lambda v: 0 < v <= 1)),
    "top_k": (int, Rule("0 or greater (0: all tokens)", lambda v: v >= 0)),
    "min_p": (float, Rule("between 0 and 1", lambda v: 0 <= v <= 1)),
    "seed": (int, Rule(f"from 0 to {LARGEST_SEED}", lambda v: 0 <= v <= LARGEST_SEED)),
}


class Spelling(NamedTuple):
    """How messages write a setting: as an argument in Python, or as an option of a command.

    name: returns the name as the user writes it. assign: stands between name and value.
    """

    name: Callable[[str], str]
    assign: str


PYTHON = Spelling(lambda name: name, "=")


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are generated, with mlx-lm's names and meanings.

    Attributes:
        max_tokens: maximum length of a response.
        temperature: 0 takes the likeliest token each time (greedy decoding); a higher one draws
            less likely tokens more often.
        top_p: draw among the likeliest tokens that have this probability together; 1: all.
        top_k: draw among so many of the likeliest tokens; 0: all.
        min_p: draw among the tokens that are at least this share as likely as the likeliest one.
        seed: of the random numbers, the same for each prompt, so that a response does not depend
            on the prompts before it; None: another one each time.
    """

    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time, so that nothing is drawn."""
        return self.temperature == 0

    def problems(self, spelling: Spelling = PYTHON) -> Iterator[str]:
        """Yield what is wrong, one sentence each: values out of range, or without effect."""
        name_of, assign = spelling
        wrong = False
        for name, (kind, rule) in _RULES.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not is_of_type(value, kind):
                yield f"{name_of(name)} is {value!r}; it must be {describe(kind)}"
            elif not rule.holds(value):
                yield f"{name_of(name)} is {value}; it must be {rule.text}"
            else:
                continue
            wrong = True
        if wrong or not self.is_greedy:
            return
        for name in ("top_p", "top_k", "min_p", "seed"):
            if (value := getattr(self, name)) != _DEFAULTS[name]:
                yield (
                    f"{name_of(name)} is {value}, which has no effect at temperature 0, where the "
                    f"likeliest token is always taken; add {name_of('temperature')}{assign}0.7, or "
                    f"leave {name_of(name)} out"
                )

    def check(self, spelling: Spelling = PYTHON) -> None:
        """Check all settings.

        Raises:
            InvalidSettingsError: some are out of range or without effect; it names all of them.
        """
        if problems := list(self.problems(spelling)):
            raise InvalidSettingsError(problems)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {name: getattr(self, name) for name in _RULES}


_DEFAULTS: Mapping[str, Any] = MappingProxyType(SamplingSettings().as_dict())
