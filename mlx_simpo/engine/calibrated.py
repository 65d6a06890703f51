"""The engine of a run, with figures that are measured on its machine, now or by an earlier run.

Measurements are cached in the user's cache folder, one file per device, version, model and kind of
training. A file that is damaged, or has another format, is measured again and replaced.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config.simpo_config import SimPOConfig
from ..data.encode import EncodedPair
from ..device import is_gpu, memory_limit_bytes, processor
from ..errors import SimPOError, one_line
from ..files import read_json, write_durably
from ..paths import cache_folder
from ..version import __version__
from .calibration import Calibration, calibrate
from .choice import Engine, check_gradient, configured_engine
from .figures import Figures
from .trial_shapes import Lengths, typical_lengths

FORMAT = 1  # of the cached files; another number whenever something else is measured
EARLIER = "measured earlier on this machine"


def run_engine(
    config: SimPOConfig,
    model: Any,
    pairs: Sequence[EncodedPair],
    figures: Figures | None = None,
) -> Engine:
    """Return the engine that a run's settings name, for training on these pairs.

    On a GPU its figures are measured, unless ``engine.calibration`` is off. On a CPU they are the
    built-in ones: those were measured on a CPU, and runs there are the same to the last digit.

    Args:
        model: with LoRA attached. figures: that the run has recorded, instead.

    Raises:
        SimPOError: ``logps.impl`` or ``engine.attention`` cannot run here, or the model has no
            gradient here.
    """
    engine = configured_engine(config, model, figures)
    check_gradient(model, engine)
    is_fixed = figures is not None or config.engine.calibration == "off" or not is_gpu()
    if engine.figures is None or is_fixed:
        return engine
    figures = load_or_calibrate(model, config, typical_lengths(pairs)).figures
    # Tried again: the figures may choose other operations, and arrange pairs in another way.
    return configured_engine(config, model, figures)


def load_or_calibrate(model: Any, config: SimPOConfig, lengths: Lengths) -> Calibration:
    """Return what an earlier run has measured of this model here, or measure it now.

    Raises:
        SimPOError: ``logps.impl`` or ``engine.attention`` cannot run here.
    """
    key = calibration_key(model, config, lengths)
    path = calibration_folder() / f"{_sha256(key)[:32]}.json"
    try:
        return _decode(read_json(path), key)
    except SimPOError:
        pass  # not there, damaged, or of another format: all that it costs is to measure again
    calibration = calibrate(model, config, lengths)
    # What could not be measured may be measured next time, when the machine has less to do.
    if not calibration.is_complete:
        return calibration
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, _encode(calibration, key))
    except OSError as error:
        source = f"{calibration.figures.source}, and not kept for the next run ({one_line(error)})"
        return replace(calibration, figures=replace(calibration.figures, source=source))
    return calibration


def calibration_folder() -> Path:
    """Return the folder of the cached measurements: $MLX_SIMPO_CACHE/calibration, or in the user's
    cache."""
    return cache_folder() / "calibration"


def calibration_key(model: Any, config: SimPOConfig, lengths: Lengths) -> dict[str, Any]:
    """Return what decides the figures, as plain values for JSON."""
    weights: Any = tree_flatten(model.parameters())
    trainable: Any = tree_flatten(model.trainable_parameters())
    shapes = [(name, list(array.shape), str(array.dtype)) for name, array in weights]
    return {
        "format": FORMAT,
        "versions": {"mlx_simpo": __version__, **{n: version(n) for n in ("mlx", "mlx-lm")}},
        "device": [str(mx.default_device()), processor(), memory_limit_bytes() >> 30],
        # Quantization shows in the shapes, LoRA in the names.
        "model": _sha256([type(model).__module__, shapes, [name for name, _ in trainable]]),
        "lengths": list(lengths),
        "settings": [
            config.logps.impl,
            config.engine.attention,
            config.lora.dropout,
            config.train.gradient_checkpointing,
            config.train.max_tokens_per_step,
        ],
    }


def _encode(calibration: Calibration, key: dict[str, Any]) -> bytes:
    """Return what `_decode` reads."""
    content = {
        "key": key,
        "measured": asdict(calibration) | {"figures": calibration.figures.as_dict()},
        "evidence": calibration.figures.evidence,
    }
    return (json.dumps({**content, "sha256": _sha256(content)}, indent=1) + "\n").encode()


def _decode(content: dict[str, Any], key: dict[str, Any]) -> Calibration:
    """Return what was measured for this key.

    Raises:
        SimPOError: the content is that of another key, or damaged.
    """
    digest = content.pop("sha256", None)
    if content.get("key") != key or _sha256(content) != digest:
        raise SimPOError("not what was measured here")
    values = content["measured"]
    figures = Figures.from_dict(values["figures"], EARLIER, content["evidence"])
    return Calibration(**{**values, "figures": figures})


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
