"""The base model of a conversion: loaded by us, and its checkpoint as it lies on disk."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import SimPOError
from ..files import read_header, read_json, weight_files
from ..model.adapters import flat_arrays
from ..model.loading import LoadedModel, load_model
from .architectures import Architecture, architecture_of
from .names import checkpoint_shapes, refuse_unknown_stacks, unwrapped
from .probe import Shape, trace
from .weights import Layout, sources_of


@dataclass(frozen=True)
class Base:
    """A base model by its name; everything else is read when it is asked for.

    name: Hub id or folder. revision, trust_remote_code: as for `load_model`.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    def load(self, dtype: str = "auto") -> LoadedModel:
        """The model, freshly loaded; the weights are read when first used."""
        return load_model(
            self.name,
            revision=self.revision,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
        )


def config_of(loaded: LoadedModel) -> dict[str, Any]:
    """config.json as it stands in the model's folder."""
    return read_json(loaded.folder / "config.json")


def architecture(loaded: LoadedModel) -> Architecture:
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


def in_mlx_names(loaded: LoadedModel) -> bool:
    """Whether the model's files have MLX's names: mlx-lm wrote them, or they are packed its way."""
    if "quantization" in config_of(loaded):
        return True
    return any(read_header(path).format == "mlx" for path in weight_files(loaded.folder))


def layout_of(loaded: LoadedModel, rule: Architecture) -> Layout:
    """How the model's arrays lie in a checkpoint of its own library, checked by the probe.

    Raises:
        SimPOError: rule, checkpoint and mlx-lm's sanitize contradict each other.
    """
    # sanitize may have taken layers out of the model when it was loaded (gemma3_text's tied head).
    there = flat_arrays(loaded.model.parameters()).keys()
    bare = flat_arrays(fresh_model(loaded).parameters())
    wanted = {name: array.shape for name, array in bare.items() if name in there}
    shapes = checkpoint_shapes({n: bare[n] for n in wanted}, rule)
    disk = shapes
    if is_plain(loaded):
        disk = checkpoint_on_disk(loaded.folder)
        shapes = spelled_as(disk, shapes, rule)
        if absent := sorted(shapes.items() - disk.items()):
            raise SimPOError(
                f"the checkpoint of {loaded.name} does not have {absent[0][0]} of shape "
                f"{absent[0][1]}, which the rule for {rule.model_type} expects"
            )
    elif rule.wrapped:
        raise SimPOError(text_alone(loaded, rule))
    # All there is: what else lies in the checkpoint may change what sanitize does.
    found = trace(lambda: fresh_model(loaded), disk)
    made = {name: shape for name, (shape, _) in found.items()}
    if odd := sorted(wanted.items() ^ made.items()):
        raise SimPOError(
            f"mlx-lm's sanitize does not make {odd[0][0]} of shape {odd[0][1]} of a "
            f"{rule.model_type} checkpoint as the rule describes it; such a model is not converted"
        )
    layout = Layout(shapes, {name: parts for name, (_, parts) in found.items()})
    if odd := sorted(sources_of(layout, set(found)) - shapes.keys()):
        raise SimPOError(
            f"mlx-lm's sanitize makes weights of {odd[0]}, which the rule for {rule.model_type} "
            "does not expect; such a model is not converted"
        )
    return layout


def is_plain(loaded: LoadedModel) -> bool:
    """Whether the model's files are a checkpoint as transformers saves it, and not packed."""
    return not in_mlx_names(loaded) and "quantization_config" not in config_of(loaded)


def spelled_as(
    there: dict[str, Shape], shapes: dict[str, Shape], rule: Architecture
) -> dict[str, Shape]:
    """A wrapped model's tensors as its checkpoint spells them: language_model.model (transformers
    4, and 5 for some types) or model.language_model."""
    if not rule.wrapped or shapes.keys() <= there.keys():
        return shapes
    return {unwrapped(name): shape for name, shape in shapes.items()}


def text_alone(loaded: LoadedModel, rule: Architecture) -> str:
    """Why no complete folder can be made of a wrapped model that is no plain checkpoint, and what
    to do."""
    state = "has MLX's names" if in_mlx_names(loaded) else "is packed (quantization_config)"
    return (
        f"{loaded.name} {state}, and a complete folder of a {rule.model_type} model with its "
        "vision tower is made of a checkpoint as transformers saves it only; fuse with --format "
        "mlx, or convert the adapter alone (mlx-simpo convert to-peft), or name the original model "
        "as --model if the adapter is to go into its weights instead of these"
    )


def checkpoint_on_disk(folder: Path) -> dict[str, Shape]:
    """Names and shapes of all tensors in a model's folder."""
    return {
        name: shape
        for path in weight_files(folder)
        for name, shape in read_header(path).shapes.items()
    }


def fresh_model(loaded: LoadedModel) -> nn.Module:
    """Another model of the same class and settings, without weights."""
    name = type(loaded.model).__module__
    module = sys.modules.get(name) or importlib.import_module(name)
    return module.Model(module.ModelArgs.from_dict(loaded.config))
