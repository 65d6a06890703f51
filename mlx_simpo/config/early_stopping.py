"""The settings of the section train.early_stopping."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from .schema import NON_NEGATIVE, POSITIVE, Section, setting


@dataclass(frozen=True)
class EarlyStoppingConfig(Section):
    """When a run ends because its evaluations no longer improve."""

    NAME: ClassVar[str] = "train.early_stopping"

    metric: Literal["loss", "rewards/accuracies", "rewards/margins"] = setting(
        "loss", "metric of the evaluations that has to improve: the loss falls, the others rise"
    )
    patience: int | None = setting(
        None,
        "stop after this many evaluations in a row without an improvement; null: never",
        POSITIVE,
        on_resume="free",
    )
    min_delta: float = setting(
        0.0,
        "a change of the metric by no more than this is not an improvement",
        NON_NEGATIVE,
        "free",
    )

    def conflicts(self) -> Iterator[str]:
        """Yield a message for all settings that exclude each other."""
        if self.patience is not None:
            return
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                yield (
                    f"{self.NAME}.{item.name} is {value!r}, but {self.NAME}.patience is null, so "
                    "that no run stops early; set patience to a number of evaluations"
                )
