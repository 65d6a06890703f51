"""What a run was trained with, and whether it may go on with something else."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..config.schema import all_settings
from ..config.simpo_config import SimPOConfig
from ..data.mixing import Mixture
from ..data.tokens import content_sha256
from ..device import processor
from ..errors import SimPOError
from ..model.record import base_record, content_hash, template_hash
from ..version import __version__

if TYPE_CHECKING:
    from .session import Session

_ABSENT = object()
PACKAGES = ("mlx", "mlx-lm")


def fingerprint(session: "Session") -> dict[str, Any]:
    """Return what decides the result of a run, as plain values for JSON: its settings, the content
    of pairs, model and chat template, the versions of the packages, and the processor."""
    return {
        "config": session.config.as_dict(),
        "training pairs": content_sha256(session.train),
        "validation pairs": _validation_pairs(session),
        "main validation set": session.valid_main,
        "training sources": _sources(session),
        "model": {
            "quantization": base_record(session.loaded)["quantization"],
            "content": content_hash(session.loaded.folder),
        },
        "chat template": template_hash(session.encoder.renderer.text),
        "versions": {
            "mlx-simpo": __version__,
            **{name: version(name) for name in PACKAGES},
            "the processor": processor(),
        },
    }


def _validation_pairs(session: "Session") -> str | dict[str, str]:
    """Return the hash of the validation pairs; of named sets, by their names."""
    if session.valid_main:
        return {name: content_sha256(pairs) for name, pairs in session.valid_sets.items()}
    return content_sha256(session.valid)


def _sources(session: "Session") -> str:
    """Return names, sizes and weights of several training sources in words; "" for one."""
    pairs = session.train
    if not isinstance(pairs, Mixture) or len(pairs.names) == 1:
        return ""
    weights = pairs.weights or [None] * len(pairs.names)
    return ", ".join(
        f"{name} ({size} pairs" + (")" if weight is None else f", weight {weight!r})")
        for (name, size), weight in zip(pairs.sizes.items(), weights, strict=True)
    )


def check_same_run(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Check that a run that had the fingerprint ``saved`` may go on with ``current``.

    Returns:
        A message for each difference that is allowed but changes the rounding, or the schedule.

    Raises:
        SimPOError: something differs that must not; the message names all of it.
    """
    if problems := _problems(saved, current):
        raise SimPOError(
            f"this run cannot go on with other settings or data: {'; '.join(problems)}. Undo these "
            "changes, or begin a new run in another output folder; docs/long_runs.md lists what "
            "may change"
        )
    then, now, messages = saved["config"], current["config"], []
    if changed := changed_settings(then, now, "rounding"):
        messages.append(
            f"{', '.join(changed)} changed: the run goes on, but not bit for bit as it would have"
        )
    if (then["train"]["epochs"], then["train"]["steps"]) != (
        now["train"]["epochs"],
        now["train"]["steps"],
    ):
        messages.append(
            "the number of steps changed: the learning rate follows the schedule of the new number "
            "from here on"
        )
    versions = [
        f"{name} was {saved['versions'].get(name)} and is {there}"
        for name, there in current["versions"].items()
        if saved["versions"].get(name) != there
    ]
    if versions:
        messages.append(
            f"{'; '.join(versions)}: the run goes on, but not bit for bit as it would have"
        )
    return messages


def _problems(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return what differs and must not, each in a few words."""
    then, now = saved["config"], current["config"]
    problems = [
        f"{name} was {_setting(then, name)!r} and is {_setting(now, name)!r}"
        for name in changed_settings(then, now, "same")
    ]
    pairs_then, pairs_now = _step_pairs(then), _step_pairs(now)
    if pairs_then != pairs_now:
        problems.append(
            f"train.batch_size × train.gradient_accumulation_steps was {pairs_then} and is "
            f"{pairs_now}"
        )
    problems += [
        f"the {name} {was} {saved[name] or 'a single one'} and {now_is} "
        f"{current[name] or 'a single one'}"
        for name, was, now_is in (
            ("training sources", "were", "are"),
            ("main validation set", "was", "is"),
        )
        # What an older version did not record is not compared.
        if name in saved and saved[name] != current[name]
    ]
    return problems + [
        f"the {name} changed"
        for name in ("training pairs", "validation pairs", "model", "chat template")
        if saved[name] != current[name]
    ]


def changed_settings(then: dict[str, Any], now: dict[str, Any], on_resume: str) -> list[str]:
    """Return the names of the settings with this rule (`schema.OnResume`) that differ.

    A setting that an older version did not have is not compared.
    """
    return [
        name
        for name, item, _ in all_settings(SimPOConfig)
        if item.metadata["on_resume"] == on_resume
        and _setting(then, name) not in (_setting(now, name), _ABSENT)
    ]


def _setting(config: dict[str, Any], name: str) -> Any:
    """Return a setting of a configuration as nested dicts; _ABSENT if it has none of this name."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
    return value


def _step_pairs(config: dict[str, Any]) -> int:
    train = config["train"]
    return train["batch_size"] * train["gradient_accumulation_steps"]
