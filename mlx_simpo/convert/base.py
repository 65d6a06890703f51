"""The base model of a conversion, and how its arrays are laid out in its checkpoint."""

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
from .architectures import Architecture, table_entry
from .names import check_stacks_known, checkpoint_shapes, transformers_name
from .probe import Shape, trace
from .weights import Layout, source_names


@dataclass(frozen=True)
class Base:
    """A base model by its name, loaded again each time it is needed.

    name: Hub id or folder. revision, trust_remote_code: as for `load_model`.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    def load(self, dtype: str = "auto") -> LoadedModel:
        """Load the model; its weights are read when they are first used."""
        return load_model(
            self.name,
            revision=self.revision,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
        )


def config_of(loaded: LoadedModel) -> dict[str, Any]:
    """Return config.json as it is in the model's folder."""
    return read_json(loaded.folder / "config.json")


def architecture_of(loaded: LoadedModel) -> Architecture:
    """Return the rule by which a model is converted.

    A model type that is not in the table gets the rule that all names are the same on both sides;
    the probe then checks that this is so.

    Raises:
        SimPOError: the type is not converted, or it is not in the table and its names are not
            provably the same in both libraries.
    """
    config = config_of(loaded)
    rule = table_entry(config)
    if rule is None:
        rule = Architecture(str(config.get("model_type")), "not in the table: by the probe alone")
        if has_mlx_names(loaded):
            raise SimPOError(
                f"models of type {rule.model_type} are not in the table of architectures, and "
                f"{loaded.name} has MLX's names, which do not tell the original ones; use the "
                "original model as --model, or fuse with --format mlx (`mlx-simpo convert "
                "architectures` lists the table)"
            )
        checkpoint_layout(loaded, rule)
    check_stacks_known(loaded.model, rule)
    return rule


def has_mlx_names(loaded: LoadedModel) -> bool:
    """Whether the model's files use MLX's names: mlx-lm wrote them, or they are quantized by it."""
    if "quantization" in config_of(loaded):
        return True
    return any(read_header(path).format == "mlx" for path in weight_files(loaded.folder))


def checkpoint_layout(loaded: LoadedModel, rule: Architecture) -> Layout:
    """Return how the model's arrays are laid out in a transformers checkpoint.

    The rule tells which tensors the checkpoint has, and the probe what sanitize makes of them; both
    must agree with the model.

    Raises:
        SimPOError: rule, checkpoint and mlx-lm's sanitize contradict each other, or the model is a
            vision-language model whose checkpoint is not available.
    """
    # sanitize may have removed layers from the loaded model (gemma3_text's tied head).
    names = flat_arrays(loaded.model.parameters()).keys()
    # Of a new model, since the arrays of a quantized one have other shapes.
    arrays = {n: a for n, a in flat_arrays(new_model(loaded).parameters()).items() if n in names}
    expected = {name: array.shape for name, array in arrays.items()}
    shapes = checkpoint_shapes(arrays, rule)
    all_shapes = shapes
    if is_transformers_checkpoint(loaded):
        all_shapes = shapes_on_disk(loaded.folder)
        shapes = spelled_as_on_disk(shapes, all_shapes, rule)
        if absent := sorted(shapes.items() - all_shapes.items()):
            raise SimPOError(
                f"the checkpoint of {loaded.name} does not have {absent[0][0]} of shape "
                f"{absent[0][1]}, which the rule for {rule.model_type} expects; such a model is "
                "not converted"
            )
    elif rule.vision_language:
        raise SimPOError(without_vision_tower(loaded, rule))
    # Of all tensors on disk: those that the model does not use may change what sanitize does.
    traced = trace(lambda: new_model(loaded), all_shapes)
    actual = {name: shape for name, (shape, _) in traced.items()}
    if differing := sorted(expected.items() ^ actual.items()):
        name, shape = differing[0]
        raise SimPOError(
            f"the rule for {rule.model_type} and mlx-lm's sanitize disagree about {name} of shape "
            f"{shape}; such a model is not converted"
        )
    layout = Layout(shapes, {name: pieces for name, (_, pieces) in traced.items()})
    if unexpected := sorted(source_names(layout, set(traced)) - shapes.keys()):
        raise SimPOError(
            f"mlx-lm's sanitize makes weights of {unexpected[0]}, which the rule for "
            f"{rule.model_type} does not expect; such a model is not converted"
        )
    return layout


def is_transformers_checkpoint(loaded: LoadedModel) -> bool:
    """Whether the model's files are a checkpoint as transformers saves it, not quantized."""
    return not has_mlx_names(loaded) and "quantization_config" not in config_of(loaded)


def spelled_as_on_disk(
    shapes: dict[str, Shape], on_disk: dict[str, Shape], rule: Architecture
) -> dict[str, Shape]:
    """Return a model's tensors under the names that its checkpoint uses for them.

    Checkpoints of vision-language models have their text part below language_model.model
    (transformers 4, and 5 for some types) or below model.language_model.

    Args:
        shapes: of the tensors that the rule expects, under MLX's prefix.
        on_disk: of the tensors in the checkpoint.
    """
    if not rule.vision_language or shapes.keys() <= on_disk.keys():
        return shapes
    return {transformers_name(name): shape for name, shape in shapes.items()}


def without_vision_tower(loaded: LoadedModel, rule: Architecture) -> str:
    """Return why no complete folder can be written for a vision-language model, and what to do."""
    state = (
        "has MLX's names" if has_mlx_names(loaded) else "is quantized (it has quantization_config)"
    )
    return (
        f"{loaded.name} {state}, but a complete folder of a {rule.model_type} model with its "
        "vision tower can only be made from a checkpoint as transformers saves it; fuse with "
        "--format mlx, or convert the adapter alone (mlx-simpo convert to-peft), or name the "
        "original model as --model if the adapter is to be merged into its weights instead"
    )


def shapes_on_disk(folder: Path) -> dict[str, Shape]:
    """Return names and shapes of all tensors in a model's folder."""
    return {
        name: shape
        for path in weight_files(folder)
        for name, shape in read_header(path).shapes.items()
    }


def new_model(loaded: LoadedModel) -> nn.Module:
    """Return another model of the same class and settings, without weights and not quantized."""
    name = type(loaded.model).__module__
    module = sys.modules.get(name) or importlib.import_module(name)
    return module.Model(module.ModelArgs.from_dict(loaded.config))
