"""Updates from a PEFT adapter's tensors."""

import re
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ...files import load_safetensors
from ...model.adapters import PEFT_WEIGHTS
from ..architectures import Architecture, refuse_adapter_on
from ..lora_delta import LoRADelta, check_lora_delta
from ..names import (
    EMBEDDING,
    STACKED,
    TEXT_PARTS,
    Target,
    adaptable_layers,
    layer_shape,
    peft_target,
    separate_target,
)
from .config import PeftConfig, ends_in, read_peft_config

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
_BASE = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")
Tensors = dict[str, dict[str, mx.array]]  # by module, then by A, B, magnitude


def read_peft(folder: Path, model: nn.Module, architecture: Architecture) -> dict[str, LoRADelta]:
    """The updates of a PEFT adapter for a bare MLX model, by MLX's paths.

    Raises:
        SimPOError: it cannot be read or held by mlx-lm (see `peft_config`), has tensors that the
            model has no layer for, or lacks some that its configuration promises.
    """
    config = read_peft_config(folder)
    everything = load_safetensors([folder / PEFT_WEIGHTS])
    kept = {name: array for name, array in everything.items() if _BASE.fullmatch(name)}
    tensors = by_module({n: a for n, a in everything.items() if n not in kept}, config)
    reader = Reader(config, tensors, model, architecture)
    reader.check_base(kept)
    updates = reader.updates()
    reader.check_complete()
    for path, update in updates.items():
        refuse_adapter_on(path, architecture)
        check_lora_delta(path, update, reader.layers[path])
    if not updates:
        raise config.refusal("there is no tensor of any adapter beside it")
    return updates


def by_module(tensors: dict[str, mx.array], config: PeftConfig) -> Tensors:
    """The tensors by module and kind; SimPOError for one that is none of LoRA's."""
    found: Tensors = {}
    for name, array in tensors.items():
        parts = _KEY.fullmatch(name)
        if parts is None:
            raise config.refusal(f"{name[:120]!r} in {PEFT_WEIGHTS} is no tensor of a LoRA adapter")
        kind = parts["kind"].replace("embedding_", "").removeprefix("lora_")
        found.setdefault(parts["module"], {})[kind] = array
    for module, kinds in found.items():
        needed = {"A", "B"} | ({"magnitude_vector"} if config.content.get("use_dora") else set())
        if kinds.keys() != needed:
            odd = ", ".join(sorted(kinds.keys() ^ needed))
            raise config.refusal(f"{module[:120]} has too many or too few tensors: {odd}")
    return found


def text_part(modules: Iterable[str]) -> str:
    """Which of TEXT_PARTS these modules of a wrapped model's adapter lie in."""
    whole, alone, before = TEXT_PARTS
    for name in modules:
        if name.startswith("language_model."):
            return before
        if name.startswith((f"{alone}layers.", f"{alone}embed_tokens")):
            return alone
    return whole


class Reader:
    """Finds each of the model's layers among an adapter's modules."""

    def __init__(
        self, config: PeftConfig, tensors: Tensors, model: nn.Module, architecture: Architecture
    ) -> None:
        self.config, self.tensors, self.architecture = config, tensors, architecture
        self.layers = adaptable_layers(model)
        text = text_part(tensors)
        self.targets = {path: peft_target(path, architecture, text) for path in self.layers}
        self.left = set(tensors)  # modules that no layer has claimed yet

    def updates(self) -> dict[str, LoRADelta]:
        """All updates; SimPOError if a module is left over."""
        found: dict[str, LoRADelta] = {}
        for path, target in self.targets.items():
            if isinstance(self.layers[path], STACKED):
                update = self.fused_experts(path, target) or self.separate_experts(path)
            else:
                update = self.plain(path, target)
            if update is not None:
                found[path] = update
        if self.left:
            why = "is it an adapter of another model?"
            if (experts := self.architecture.experts) and experts.unpaired:
                why = f"if they are single experts: {experts.unpaired}"
            if self.architecture.wrapped:
                why = "MLX runs the text part alone, an adapter on the vision tower has no place"
            raise self.config.refusal(
                f"{len(self.left)} of its modules are not in this model, e.g. "
                f"{min(self.left)[:120]}; {why}"
            )
        return found

    def take(self, module: str, path: str, experts: int = 1) -> LoRADelta | None:
        """The update of one module as its tensors have it.

        Args:
            path: what the configuration's patterns match. experts: that A and B hold.
        """
        if module not in self.tensors:
            return None
        self.left.discard(module)
        kinds = self.tensors[module]
        rank, scale = self.config.scale(path)
        a, b = kinds["A"], kinds["B"]
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank * experts:
            raise self.config.refusal(
                f"A and B of {module[:120]} have shapes {a.shape} and {b.shape}, which do not "
                f"belong to rank {rank}" + (f" of {experts} experts" if experts > 1 else "")
            )
        return LoRADelta(a, b, scale, kinds.get("magnitude_vector"))

    def plain(self, path: str, target: Target) -> LoRADelta | None:
        """An ordinary layer, or a layer whose weight is named as a parameter."""
        names = dict.fromkeys((target.module, path.removeprefix(self.architecture.prefix)))
        for module in names:
            update = self.take(module, target.path if self.is_parameter(target) else module)
            if update is not None:
                return update
        return None

    def is_parameter(self, target: Target) -> bool:
        """Whether the configuration names this layer's weight as a parameter."""
        return target.parameter is not None and self.config.parameter(target.path)

    def fused_experts(self, path: str, target: Target) -> LoRADelta | None:
        """One projection of all experts, out of a parameter that may hold two of them."""
        named = [
            name
            for name in ("gate_up_proj", "down_proj")  # the order of the parameters in the module
            if self.config.parameter(f"{target.module}.{name}")
        ]
        if target.parameter not in named:
            return None
        # PEFT wraps the module once for each parameter: the first one lies innermost.
        depth = len(named) - 1 - named.index(target.parameter)
        experts, outputs, inputs = layer_shape(self.layers[path])
        update = self.take(target.module + ".base_layer" * depth, target.path, experts)
        if update is None:
            return None
        part, parts = target.part
        if update.a.shape[1] != inputs or update.b.shape[0] != outputs * parts:
            raise self.config.refusal(
                f"A and B of {target.path} have shapes {update.a.shape} and {update.b.shape}; this "
                f"model has {inputs} inputs and {outputs * parts} outputs there"
            )
        # The number of the expert runs fastest in B and slowest in A (peft/tuners/lora/layer.py).
        a = update.a.reshape(experts, -1, inputs)
        b = update.b.reshape(outputs * parts, -1, experts).transpose(2, 0, 1)
        b = b[:, part * outputs : (part + 1) * outputs]
        projection = LoRADelta(a, b, update.scale)
        return projection.without_zeros() if parts > 1 else projection

    def separate_experts(self, path: str) -> LoRADelta | None:
        """One projection of all experts, from adapters with a pair of matrices for each expert."""
        rule = self.architecture.experts
        if rule is None or not rule.separate or rule.unpaired:
            return None
        found, absent = [], []
        for number in range(layer_shape(self.layers[path])[0]):
            module = separate_target(path, number, self.architecture).module
            update = next(filter(None, (self.take(n, n) for n in self.spellings(module))), None)
            (absent if update is None else found).append(update or module)
        if not found:
            return None
        if absent:
            raise self.config.refusal(f"{len(absent)} experts have no tensors, e.g. {absent[0]}")
        if len({(update.rank, update.scale) for update in found}) > 1:
            raise self.config.refusal(f"the experts of {path} have different ranks or scales")
        return LoRADelta(
            mx.stack([update.a for update in found]),
            mx.stack([update.b for update in found]),
            found[0].scale,
        )

    def spellings(self, module: str) -> list[str]:
        """A module's path as the checkpoint has it, and as transformers 5 has it."""
        now = module
        for old, new in self.architecture.renamed:
            now = now.replace(old, new)
        return list(dict.fromkeys((module, now)))

    def check_base(self, kept: dict[str, mx.array]) -> None:
        """SimPOError for weights of the base, which PEFT saves beside an adapter on the embedding
        or the output layer, if they are not those of this model (a resized vocabulary, say)."""
        paths = {target.module: path for path, target in self.targets.items()}
        for name, array in kept.items():
            found = _BASE.fullmatch(name)
            path = paths.get(found["module"]) if found else None
            layer = self.layers.get(path or "")
            if layer is not None and layer_shape(layer) == array.shape:
                weight = layer["weight"]
                # Packed weights are another model's in any case, which the caller is told.
                if "scales" in layer or mx.array_equal(weight.astype(array.dtype), array):
                    continue
            raise self.config.refusal(
                f"{name[:120]} in {PEFT_WEIGHTS} is a weight of the base model and another than "
                "in this one; merge the adapter with PEFT (merge_and_unload) and convert that"
            )

    def check_complete(self) -> None:
        """SimPOError if the configuration names layers that have no tensors, or not those of a
        module that has some: PEFT would leave either out and say nothing."""
        plain = {t.module: p for p, t in self.targets.items() if t.parameter is None}
        embeddings = {m for m, p in plain.items() if isinstance(self.layers[p], EMBEDDING)}
        wanted = self.config.targeted(plain, set(plain) - embeddings, "lm_head")
        missing = {module for module in wanted if module not in self.tensors}
        for target in self.targets.values():
            if target.parameter is not None and self.config.parameter(target.path):
                present = target.module in self.tensors
                missing |= set() if present else {target.path}
        for name in self.config.content.get("target_parameters") or []:
            if not any(t.path == name or ends_in(t.path, [name]) for t in self.targets.values()):
                missing.add(name)
        if missing:
            raise self.config.refusal(
                f"it names {len(missing)} layers that have no tensors in {PEFT_WEIGHTS}, e.g. "
                f"{min(missing)[:120]}; the adapter is incomplete"
            )
        if unnamed := sorted(filter(self.unnamed, self.tensors)):
            raise self.config.refusal(
                f"{PEFT_WEIGHTS} has {len(unnamed)} modules that it does not name, e.g. "
                f"{unnamed[0][:120]}; PEFT would leave them out"
            )

    def unnamed(self, module: str) -> bool:
        """Whether no setting names this module of the file."""
        inside = module.removesuffix(".base_layer")
        by_parameter = any(
            target.module == inside and self.is_parameter(target)
            for target in self.targets.values()
        )
        return not by_parameter and self.config.leaves_out(module)
