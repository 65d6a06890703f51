"""The base model of a conversion: loaded by us, and its checkpoint as it lies on disk."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import SimPOError
from ..model.adapters import flat_arrays
from ..model.files import read_header, read_json, weight_files
from ..model.loading import Loaded, load_model
from .architectures import Architecture, architecture_of
from .names import checkpoint_shapes, refuse_unknown_stacks
from .probe import Shape, trace
from .weights import Layout


@dataclass(frozen=True)
class Base:
    """A base model by its name; everything else is read when it is asked for.

    name: Hub id or folder. revision, trust_remote_code: as for `load_model`.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    def load(self, dtype: str = "auto") -> Loaded:
        """The model, freshly loaded; the weights are read when first used."""
        return load_model(
            self.name,
            revision=self.revision,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
        )


def config_of(loaded: Loaded) -> dict[str, Any]:
    """config.json as it stands in the model's folder."""
    return read_json(loaded.folder / "config.json")


def architecture(loaded: Loaded) -> Architecture:
    """The rule for a model; for a type that is not in the table, the one that nothing is renamed,
    which only holds where the probe finds that this is so.

    Raises:
        SimPOError: the type is refused, or unknown and not provably the same in both libraries.
    """
    config = config_of(loaded)
    found = architecture_of(config)
    if found is None:
        found = Architecture(str(config.get("model_type")), "not in the table: by the probe alone")
        if in_mlx_names(loaded):
            raise SimPOError(
                f"models of type {found.model_type} are not in the table of architectures, and "
                f"{loaded.name} has MLX's names, which say nothing of the original ones; use the "
                "original model as --model (`mlx-simpo convert architectures` lists what is known)"
            )
        layout_of(loaded, found)
    refuse_unknown_stacks(loaded.model, found)
    return found


def in_mlx_names(loaded: Loaded) -> bool:
    """Whether the model's files have MLX's names: mlx-lm wrote them, or they are packed its way."""
    if "quantization" in config_of(loaded):
        return True
    return any(read_header(path).format == "mlx" for path in weight_files(loaded.folder))


def layout_of(loaded: Loaded, rule: Architecture) -> Layout:
    """How the model's arrays lie in a checkpoint of its own library, checked by the probe.

    Raises:
        SimPOError: rule, checkpoint and mlx-lm's sanitize contradict each other.
    """
    # sanitize may have taken layers out of the model when it was loaded (gemma3_text's tied head).
    there = flat_arrays(loaded.model.parameters()).keys()
    bare = flat_arrays(fresh_model(loaded).parameters())
    wanted = {name: array.shape for name, array in bare.items() if name in there}
    shapes = checkpoint_shapes({n: bare[n] for n in wanted}, rule)
    plain = not in_mlx_names(loaded) and "quantization_config" not in config_of(loaded)
    absent = sorted(shapes.items() - checkpoint_on_disk(loaded.folder).items()) if plain else []
    if absent:
        raise SimPOError(
            f"the checkpoint of {loaded.name} does not have {absent[0][0]} of shape "
            f"{absent[0][1]}, which the rule for {rule.model_type} expects"
        )
    found = trace(lambda: fresh_model(loaded), shapes)
    made = {name: shape for name, (shape, _) in found.items()}
    if odd := sorted(wanted.items() ^ made.items()):
        raise SimPOError(
            f"mlx-lm's sanitize does not make {odd[0][0]} of shape {odd[0][1]} of a "
            f"{rule.model_type} checkpoint as the rule describes it; such a model is not converted"
        )
    return Layout(shapes, {name: parts for name, (_, parts) in found.items()})


def checkpoint_on_disk(folder: Path) -> dict[str, Shape]:
    """Names and shapes of all tensors in a model's folder."""
    return {
        name: shape
        for path in weight_files(folder)
        for name, shape in read_header(path).shapes.items()
    }


def fresh_model(loaded: Loaded) -> nn.Module:
    """Another model of the same class and settings, without weights."""
    name = type(loaded.model).__module__
    module = sys.modules.get(name) or importlib.import_module(name)
    return module.Model(module.ModelArgs.from_dict(loaded.config))
