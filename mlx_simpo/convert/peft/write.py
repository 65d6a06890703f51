"""A PEFT adapter from updates: adapter_model.safetensors and adapter_config.json."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ...errors import SimPOError
from ...files import save_safetensors, write_text
from ...model.adapters import CONFIG, PEFT_WEIGHTS
from ..architectures import Architecture, refuse_adapter_on
from ..lora_delta import LoRADelta, common
from ..names import (
    EMBEDDING,
    STACKED,
    Target,
    adaptable_layers,
    layer_shape,
    peft_target,
    separate_target,
)
from .config import ends_in


class Written(NamedTuple):
    """One module or parameter of the PEFT adapter. key: of its tensors, without the prefix."""

    target: Target
    update: LoRADelta
    embedding: bool


def write_peft(
    folder: Path,
    updates: dict[str, LoRADelta],
    model: nn.Module,
    architecture: Architecture,
    *,
    base: str,
    revision: str | None,
    separate_experts: bool = False,
) -> None:
    """Write updates as a PEFT adapter.

    Args:
        model: the bare MLX model that they are for. base: base_model_name_or_path.
        separate_experts: a pair of matrices for each expert, as transformers before 5.0 and
            vLLM know them, instead of transformers 5's fused parameters.

    Raises:
        SimPOError: an update that PEFT has no name for.
    """
    layers = adaptable_layers(model)
    for path in updates:
        refuse_adapter_on(path, architecture)
    dora = any(update.magnitude is not None for update in updates.values())
    written = targets_of(updates, layers, architecture, separate_experts)
    if dora and any(w.target.parameter for w in written):
        parameter = next(w.target.path for w in written if w.target.parameter)
        raise SimPOError(
            f"the adapter has DoRA on {parameter}, which PEFT reaches as a parameter only, where "
            "it has no DoRA; fuse the model instead (mlx-simpo fuse)"
        )
    settings, written = scales_of(written, rslora=not separate_experts)
    tensors: dict[str, mx.array] = {}
    for module in written:
        tensors |= tensors_of(module, written)
    targets = [peft_target(path, architecture) for path in layers]
    ordinary = {target.module for target in targets if target.parameter is None}
    settings |= {"base_model_name_or_path": base, "revision": revision, "use_dora": dora}
    # A short name would mean the vision tower's layers too; and whole paths are an error where
    # transformers' class for text has others (Qwen3.5), instead of an adapter without effect.
    config = configuration(settings, written, None if architecture.wrapped else ordinary)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_text(folder / CONFIG, text)
    save_safetensors(folder / PEFT_WEIGHTS, tensors, "pt")


def configuration(
    settings: dict[str, Any], written: list[Written], ordinary: set[str] | None
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        ordinary: all the model's layers that are not reached as parameters; None if there are
            others that a short name might mean, of which nothing is known.
    """
    modules = [w.target.module for w in written if w.target.parameter is None]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        **settings,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules) if ordinary is None else short_names(modules, ordinary),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if parameters := [w.target.path for w in written if w.target.parameter]:
        # Whole paths: layers_to_transform and the like do not count for parameters.
        config["target_parameters"] = parameters
    return config


def targets_of(
    updates: dict[str, LoRADelta],
    layers: dict[str, nn.Module],
    architecture: Architecture,
    separate_experts: bool,
) -> list[Written]:
    """The updates under PEFT's names, those of one parameter joined."""
    found: list[Written] = []
    parameters: dict[Target, dict[int, LoRADelta]] = {}
    outputs: dict[Target, int] = {}
    for path, update in updates.items():
        target = peft_target(path, architecture)
        if not isinstance(layers[path], STACKED):
            embedding = isinstance(layers[path], EMBEDDING)
            found.append(Written(target, update, embedding))
        elif separate_experts:
            if not (architecture.experts and architecture.experts.separate):
                raise SimPOError(
                    f"--separate-experts: {architecture.model_type} has never had single experts; "
                    "leave it out"
                )
            if reason := architecture.experts.unpaired:
                raise SimPOError(f"--separate-experts: {reason}; leave it out")
            for number in range(len(update.a)):
                one = LoRADelta(update.a[number], update.b[number], update.scale)
                name = separate_target(path, number, architecture)
                found.append(Written(name, one, False))
        else:
            part, parts = target.part
            whole = target._replace(part=(0, parts))
            parameters.setdefault(whole, {})[part] = update
            outputs[whole] = layer_shape(layers[path])[-2]
    for target, parts in parameters.items():
        found.append(Written(target, joined(target, parts, outputs[target]), False))
    return found


def joined(target: Target, parts: dict[int, LoRADelta], outputs: int) -> LoRADelta:
    """One update of a parameter that holds several projections: each B in its own rows, the ranks
    side by side, or together where all have the same A (as PEFT trains them).

    Args:
        outputs: rows of each projection.
    """
    first = next(iter(parts.values()))
    scale, count = first.scale, target.part[1]
    same = [u for u in parts.values() if u.scale == scale and mx.array_equal(u.a, first.a)]
    if len(same) == count:
        return LoRADelta(first.a, mx.concatenate([parts[n].b for n in range(count)], axis=1), scale)
    rows = []
    for part, update in sorted(parts.items()):
        update = update.scaled_to(scale)
        above = (part * outputs, (count - 1 - part) * outputs)
        rows.append((update.a, mx.pad(update.b, [(0, 0), above, (0, 0)])))
    a = mx.concatenate([side for side, _ in rows], axis=1)
    return LoRADelta(a, mx.concatenate([side for _, side in rows], axis=2), scale)


def scales_of(written: list[Written], *, rslora: bool) -> tuple[dict[str, Any], list[Written]]:
    """(r, lora_alpha, use_rslora and patterns of the configuration, the modules scaled to them).

    lora_alpha is a whole number, since Ollama reads nothing else. Where scale × rank is none, what
    is left goes into B.

    Args:
        rslora: whether use_rslora may be set. PEFT (0.21) doubles the rank of single experts that
            it joins, and with use_rslora their scale is then wrong by √2.
    """
    rank = int(common(w.update.rank for w in written))
    scale = common(w.update.scale for w in written)
    uniform = all(w.update.rank == rank and w.update.scale == scale for w in written)
    rslora = rslora and uniform and not whole(scale * rank) and whole_at(scale, rank, True)
    ranks: dict[str, int] = {}
    alphas: dict[str, int] = {}
    scaled = []
    alpha = whole(scale * (math.sqrt(rank) if rslora else rank)) or rank
    for module in written:
        own = module.update.rank
        fitting = whole(module.update.scale * (math.sqrt(own) if rslora else own)) or own
        pattern = re.escape(module.target.path)
        if own != rank:
            ranks[pattern] = own
        if fitting != alpha:
            alphas[pattern] = fitting
        to = module.update.scale if whole_at(module.update.scale, own, rslora) else fitting / own
        scaled.append(module._replace(update=module.update.scaled_to(to)))
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return settings, scaled


def whole(value: float) -> int | None:
    """The whole number that a float is up to its rounding; None if it is none above 0."""
    nearest = round(value)
    return nearest if nearest >= 1 and math.isclose(value, nearest, rel_tol=1e-12) else None


def whole_at(scale: float, rank: int, rslora: bool) -> bool:
    """Whether a whole lora_alpha gives this scale at this rank."""
    return whole(scale * (math.sqrt(rank) if rslora else rank)) is not None


def tensors_of(module: Written, everything: list[Written]) -> dict[str, mx.array]:
    """The tensors of one module under PEFT's keys."""
    target, update = module.target, module.update
    name = f"base_model.model.{target.module}"
    if update.a.ndim == 3:
        # PEFT wraps a module once for each of its parameters, gate_up_proj first: it lies inside.
        also = any(
            w.target.module == target.module and w.target.parameter == "down_proj"
            for w in everything
        )
        name += ".base_layer" if target.parameter == "gate_up_proj" and also else ""
        experts, rank, inputs = update.a.shape
        a = update.a.reshape(experts * rank, inputs)
        # The number of the expert runs slowest in A and fastest in B (peft/tuners/lora/layer.py).
        b = update.b.transpose(1, 2, 0).reshape(update.b.shape[1], rank * experts)
        return {f"{name}.lora_A.weight": mx.contiguous(a), f"{name}.lora_B.weight": b}
    a, b = mx.contiguous(update.a), mx.contiguous(update.b)
    if module.embedding:
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if update.magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = update.magnitude
    return tensors


def short_names(modules: list[str], known: set[str]) -> list[str]:
    """target_modules that name exactly these: last parts of their paths if that is the same as the
    paths themselves, among all the model's layers."""
    names = sorted({module.rpartition(".")[2] for module in modules})
    if {module for module in known if module in names or ends_in(module, names)} == set(modules):
        return names
    return sorted(modules)
