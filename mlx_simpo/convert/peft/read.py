"""LoRA deltas from the tensors of a PEFT adapter."""

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ...files import load_safetensors
from ...model.adapters import PEFT_WEIGHTS
from ..architectures import Architecture, check_adaptable
from ..lora_delta import LoRADelta, check_lora_delta
from ..names import (
    EMBEDDING,
    STACKED,
    Target,
    adaptable_layers,
    layer_shape,
    peft_targets,
    single_expert_target,
)
from .config import PeftConfig, ends_in, read_peft_config

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
_BASE_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")
Tensors = dict[str, dict[str, mx.array]]  # by module, then by "A", "B", "magnitude_vector"


def read_peft(folder: Path, model: nn.Module, architecture: Architecture) -> dict[str, LoRADelta]:
    """Read the deltas of a PEFT adapter, by the paths of the MLX model that they are for.

    Args:
        model: the base model.

    Raises:
        SimPOError: the adapter cannot be read, mlx-lm's LoRA does not support it (see
            `read_peft_config`), it has tensors that the model has no layer for, or it lacks tensors
            that its configuration names.
    """
    config = read_peft_config(folder)  # first: it tells pickled weights from missing ones
    weights = load_safetensors([folder / PEFT_WEIGHTS])
    base = {name: match["module"] for name in weights if (match := _BASE_WEIGHT.fullmatch(name))}
    tensors = by_module({n: a for n, a in weights.items() if n not in base}, config)
    reader = Reader(config, tensors, model, architecture)
    reader.check_base_weights({module: weights[name] for name, module in base.items()})
    deltas = reader.deltas()
    reader.check_complete(deltas)
    for path, delta in deltas.items():
        check_adaptable(path, architecture)
        check_lora_delta(path, delta, reader.layers[path])
    if not deltas:
        raise config.error(f"{PEFT_WEIGHTS} beside it holds no tensors of an adapter")
    return deltas


def by_module(tensors: dict[str, mx.array], config: PeftConfig) -> Tensors:
    """Group an adapter's tensors by module and kind.

    Raises:
        SimPOError: a tensor is not one of LoRA's, or a module does not have exactly the tensors
            that it needs.
    """
    modules: Tensors = {}
    for name, array in tensors.items():
        parts = _KEY.fullmatch(name)
        if parts is None:
            raise config.error(f"{name[:120]!r} in {PEFT_WEIGHTS} is not a tensor of LoRA")
        kind = parts["kind"].replace("embedding_", "").removeprefix("lora_")
        modules.setdefault(parts["module"], {})[kind] = array
    for module, kinds in modules.items():
        needed = {"A", "B"} | ({"magnitude_vector"} if config.content.get("use_dora") else set())
        if kinds.keys() != needed:
            differing = ", ".join(sorted(kinds.keys() ^ needed))
            raise config.error(f"{module[:120]} has too many or too few tensors: {differing}")
    return modules


class Reader:
    """Matches an adapter's modules with the layers of an MLX model.

    tensors: the adapter's, by module. layers: the model's, by path. targets: PEFT's names for
    these. unread: modules that no layer has claimed yet.
    """

    def __init__(
        self, config: PeftConfig, tensors: Tensors, model: nn.Module, architecture: Architecture
    ) -> None:
        self.config, self.tensors, self.architecture = config, tensors, architecture
        self.layers = adaptable_layers(model)
        self.targets = peft_targets(self.layers, architecture, tensors)
        self.unread = set(tensors)

    def deltas(self) -> dict[str, LoRADelta]:
        """Return the deltas of all layers that the adapter adapts, by path.

        Raises:
            SimPOError: a module of the adapter does not belong to any layer.
        """
        deltas: dict[str, LoRADelta] = {}
        for path, target in self.targets.items():
            if isinstance(self.layers[path], STACKED):
                delta = self.from_fused_experts(path, target) or self.from_single_experts(path)
            else:
                delta = self.from_layer(path, target)
            if delta is not None:
                deltas[path] = delta
        if self.unread:
            why = "is it an adapter of another model?"
            if (experts := self.architecture.experts) and experts.single_unsupported:
                why = f"if they are single experts: {experts.single_unsupported}"
            if self.architecture.vision_language:
                why = (
                    "MLX runs only the text part, so an adapter on the vision tower cannot be "
                    "converted"
                )
            raise self.config.error(
                f"{len(self.unread)} of its modules are not in this model, e.g. "
                f"{min(self.unread)[:120]}; {why}"
            )
        return deltas

    def take(self, module: str, path: str, experts: int = 1) -> LoRADelta | None:
        """Return one module's delta, with the shapes that its tensors have in the file.

        Args:
            module: as the file names it.
            path: what the configuration's patterns match.
            experts: number of experts in A and B.

        Raises:
            SimPOError: A and B do not have the configured rank.
        """
        if module not in self.tensors:
            return None
        self.unread.discard(module)
        kinds = self.tensors[module]
        rank, scale = self.config.scale(path)
        a, b = kinds["A"], kinds["B"]
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank * experts:
            raise self.config.error(
                f"A and B of {module} have shapes {a.shape} and {b.shape}, which do not "
                f"belong to rank {rank}" + (f" of {experts} experts" if experts > 1 else "")
            )
        return LoRADelta(a, b, scale, kinds.get("magnitude_vector"))

    def from_layer(self, path: str, target: Target) -> LoRADelta | None:
        """Return the delta of an ordinary layer, or of one whose weight is named as a parameter."""
        # Older adapters may have the checkpoint's name of a module that transformers renamed.
        names = dict.fromkeys((target.module, path.removeprefix(self.architecture.prefix)))
        for module in names:
            delta = self.take(module, target.path if self.is_parameter(target) else module)
            if delta is not None:
                return delta
        return None

    def is_parameter(self, target: Target) -> bool:
        """Whether the configuration names this layer's weight as a parameter."""
        return target.parameter is not None and self.config.is_target_parameter(target.path)

    def from_fused_experts(self, path: str, target: Target) -> LoRADelta | None:
        """Return one projection's delta for all experts, from transformers 5's fused parameters.

        Raises:
            SimPOError: A or B has another shape than the parameter needs.
        """
        named = [
            name
            for name in ("gate_up_proj", "down_proj")  # the order of the parameters in the module
            if self.config.is_target_parameter(f"{target.module}.{name}")
        ]
        if target.parameter not in named:
            return None
        # PEFT wraps the module once per parameter: the first one is innermost.
        depth = len(named) - 1 - named.index(target.parameter)
        experts, outputs, inputs = layer_shape(self.layers[path])
        delta = self.take(target.module + ".base_layer" * depth, target.path, experts)
        if delta is None:
            return None
        part, parts = target.part
        if delta.a.shape[1] != inputs or delta.b.shape[0] != outputs * parts:
            raise self.config.error(
                f"A and B of {target.path} have shapes {delta.a.shape} and {delta.b.shape}; this "
                f"model has {inputs} inputs and {outputs * parts} outputs there"
            )
        # The expert's index varies fastest in B and slowest in A (peft/tuners/lora/layer.py).
        a = delta.a.reshape(experts, -1, inputs)
        b = delta.b.reshape(outputs * parts, -1, experts).transpose(2, 0, 1)
        b = b[:, part * outputs : (part + 1) * outputs]
        projection = LoRADelta(a, b, delta.scale)
        return projection.without_zeros() if parts > 1 else projection

    def from_single_experts(self, path: str) -> LoRADelta | None:
        """Return one projection's delta for all experts, from a pair of matrices per expert.

        Raises:
            SimPOError: some experts have no tensors, or their ranks or scales differ.
        """
        rule = self.architecture.experts
        if rule is None or not rule.checkpoint_path or rule.single_unsupported:
            return None
        deltas, missing = [], []
        for expert in range(layer_shape(self.layers[path])[0]):
            module = single_expert_target(path, expert, self.architecture).module
            delta = next(filter(None, (self.take(n, n) for n in self.spellings(module))), None)
            if delta is None:
                missing.append(module)
            else:
                deltas.append(delta)
        if not deltas:
            return None
        if missing:
            raise self.config.error(f"{len(missing)} experts have no tensors, e.g. {missing[0]}")
        if len({(delta.rank, delta.scale) for delta in deltas}) > 1:
            raise self.config.error(f"the experts of {path} have different ranks or scales")
        return LoRADelta(
            mx.stack([delta.a for delta in deltas]),
            mx.stack([delta.b for delta in deltas]),
            deltas[0].scale,
        )

    def spellings(self, module: str) -> list[str]:
        """Return a module's path in the checkpoint, and in transformers 5 if that is another."""
        current = module
        for old, new in self.architecture.renamed:
            current = current.replace(old, new)
        return list(dict.fromkeys((module, current)))

    def check_base_weights(self, base_weights: dict[str, mx.array]) -> None:
        """Check weights of the base model that are saved in the adapter's file.

        PEFT saves them beside an adapter on the embedding or the output layer. They differ from
        this model's if the vocabulary was resized, for example.

        Args:
            base_weights: by the module that they are the weights of.

        Raises:
            SimPOError: one of them is not that of this model.
        """
        paths = {target.module: path for path, target in self.targets.items()}
        for module, array in base_weights.items():
            layer = self.layers.get(paths.get(module, ""))
            if layer is not None and layer_shape(layer) == array.shape:
                weight = layer["weight"]
                # Quantized weights differ in any case.
                if "scales" in layer or mx.array_equal(weight.astype(array.dtype), array):
                    continue
            raise self.config.error(
                f"the weight of {module[:120]} in {PEFT_WEIGHTS} is the base model's and differs "
                "from the one in this model; merge the adapter with PEFT (merge_and_unload) and "
                "convert that: mlx-simpo convert from-hf"
            )

    def check_complete(self, deltas: dict[str, LoRADelta]) -> None:
        """Check that tensors and configuration name the same modules.

        PEFT ignores either kind of difference, with a warning at most.

        Args:
            deltas: what was read, by path.

        Raises:
            SimPOError: the configuration names layers that have no tensors, or the file has
                tensors of modules that the configuration does not name.
        """
        ordinary = {t.module: p for p, t in self.targets.items() if t.parameter is None}
        embeddings = {m for m, p in ordinary.items() if isinstance(self.layers[p], EMBEDDING)}
        targeted = self.config.targeted(ordinary, set(ordinary) - embeddings, "lm_head")
        missing = {module for module in targeted if module not in self.tensors}
        for path, target in self.targets.items():
            if self.is_parameter(target) and path not in deltas:
                missing.add(target.path)
        for name in self.config.content.get("target_parameters") or []:
            if not any(t.path == name or ends_in(t.path, [name]) for t in self.targets.values()):
                missing.add(name)
        if missing:
            raise self.config.error(
                f"it names {len(missing)} layers that have no tensors in {PEFT_WEIGHTS}, e.g. "
                f"{min(missing)[:120]}; the adapter is incomplete"
            )
        if ignored := sorted(filter(self.is_ignored, self.tensors)):
            raise self.config.error(
                f"{PEFT_WEIGHTS} has {len(ignored)} modules that this file does not name, e.g. "
                f"{ignored[0]}; PEFT would ignore them"
            )

    def is_ignored(self, module: str) -> bool:
        """Whether PEFT would ignore this module of the file, because no setting names it."""
        inside = module.removesuffix(".base_layer")
        by_parameter = any(
            target.module == inside and self.is_parameter(target)
            for target in self.targets.values()
        )
        return not by_parameter and self.config.is_ignored(module)
