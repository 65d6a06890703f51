"""A PEFT adapter from LoRA deltas: adapter_model.safetensors and adapter_config.json."""

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
from ..architectures import Architecture, check_adaptable
from ..lora_delta import LoRADelta, most_common
from ..names import (
    EMBEDDING,
    STACKED,
    Target,
    adaptable_layers,
    layer_shape,
    peft_target,
    single_expert_target,
)
from .config import ends_in


class Written(NamedTuple):
    """One module or parameter of the PEFT adapter.

    embedding: whether the module is one, whose tensors PEFT names differently.
    """

    target: Target
    delta: LoRADelta
    embedding: bool = False


def write_peft(
    folder: Path,
    deltas: dict[str, LoRADelta],
    model: nn.Module,
    architecture: Architecture,
    *,
    base: str,
    revision: str | None,
    separate_experts: bool = False,
) -> None:
    """Write deltas as a PEFT adapter.

    Args:
        deltas: by path in the MLX model.
        model: the base model that they are for.
        base: base_model_name_or_path.
        revision: the base model's, None for a folder.
        separate_experts: write a pair of matrices for each expert, as transformers before 5.0 and
            vLLM read them, instead of transformers 5's fused parameters.

    Raises:
        SimPOError: PEFT has no counterpart for one of the deltas.
    """
    layers = adaptable_layers(model)
    for path in deltas:
        check_adaptable(path, architecture)
    dora = any(delta.magnitude is not None for delta in deltas.values())
    written = written_modules(deltas, layers, architecture, separate_experts)
    if dora and any(w.target.parameter for w in written):
        parameter = next(w.target.path for w in written if w.target.parameter)
        raise SimPOError(
            f"the adapter has DoRA on {parameter}, which PEFT reaches only as a parameter, and it "
            "does not support DoRA on parameters; fuse the model instead (mlx-simpo fuse)"
        )
    # PEFT 0.21 doubles the rank of single experts that it joins; with use_rslora their scale would
    # then be wrong by √2.
    settings, written = scale_settings(written, rslora=not separate_experts)
    tensors: dict[str, mx.array] = {}
    for module in written:
        tensors |= tensors_of(module, written)
    targets = [peft_target(path, architecture) for path in layers]
    ordinary = {target.module for target in targets if target.parameter is None}
    settings |= {"base_model_name_or_path": base, "revision": revision, "use_dora": dora}
    # Whole paths in a vision-language model: a short name would also match layers of the vision
    # tower. Where transformers' class for text has other paths (Qwen3.5), PEFT then raises an error
    # instead of loading an adapter without effect.
    config = configuration(settings, written, None if architecture.vision_language else ordinary)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_text(folder / CONFIG, text)
    save_safetensors(folder / PEFT_WEIGHTS, tensors, "pt")


def configuration(
    settings: dict[str, Any], written: list[Written], ordinary: set[str] | None
) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Args:
        settings: from `scale_settings`, and what the base model is.
        ordinary: all the model's layers that are not reached as parameters; None if the model has
            other layers, which are not known here and which a short name might match.
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
        # Whole paths, since layers_to_transform does not apply to parameters.
        config["target_parameters"] = parameters
    return config


def written_modules(
    deltas: dict[str, LoRADelta],
    layers: dict[str, nn.Module],
    architecture: Architecture,
    separate_experts: bool,
) -> list[Written]:
    """Return the deltas under PEFT's names, with those that share a parameter joined.

    Raises:
        SimPOError: single experts were asked for, and PEFT does not support them for this type.
    """
    written: list[Written] = []
    parameters: dict[Target, dict[int, LoRADelta]] = {}
    outputs: dict[Target, int] = {}
    for path, delta in deltas.items():
        target = peft_target(path, architecture)
        if not isinstance(layers[path], STACKED):
            embedding = isinstance(layers[path], EMBEDDING)
            written.append(Written(target, delta, embedding))
        elif separate_experts:
            if not (architecture.experts and architecture.experts.checkpoint_path):
                raise SimPOError(
                    f"--separate-experts: {architecture.model_type} has never had single experts; "
                    "omit it"
                )
            if reason := architecture.experts.single_unsupported:
                raise SimPOError(f"--separate-experts: {reason}; omit it")
            for expert in range(len(delta.a)):
                single = LoRADelta(delta.a[expert], delta.b[expert], delta.scale)
                name = single_expert_target(path, expert, architecture)
                written.append(Written(name, single))
        else:
            part, count = target.part
            whole = target._replace(part=(0, count))
            parameters.setdefault(whole, {})[part] = delta
            outputs[whole] = layer_shape(layers[path])[-2]
    for target, parts in parameters.items():
        written.append(Written(target, joined(target, parts, outputs[target])))
    return written


def joined(target: Target, parts: dict[int, LoRADelta], outputs: int) -> LoRADelta:
    """Join the deltas of several projections into the delta of the parameter that holds them.

    Each B goes into the rows of its own projection. The ranks are concatenated, unless all
    projections have the same A (as PEFT trains them).

    Args:
        parts: the deltas by index of the projection; some may be absent.
        outputs: rows of each projection.
    """
    first = next(iter(parts.values()))
    scale, count = first.scale, target.part[1]
    same_a = [d for d in parts.values() if d.scale == scale and mx.array_equal(d.a, first.a)]
    if len(same_a) == count:
        return LoRADelta(first.a, mx.concatenate([parts[n].b for n in range(count)], axis=1), scale)
    # Block-diagonal: the ranks of a projection have zeros in the rows of the others.
    pairs = []
    for part, delta in sorted(parts.items()):
        delta = delta.scaled_to(scale)
        padding = (part * outputs, (count - 1 - part) * outputs)
        pairs.append((delta.a, mx.pad(delta.b, [(0, 0), padding, (0, 0)])))
    a = mx.concatenate([a for a, _ in pairs], axis=1)
    return LoRADelta(a, mx.concatenate([b for _, b in pairs], axis=2), scale)


def scale_settings(written: list[Written], *, rslora: bool) -> tuple[dict[str, Any], list[Written]]:
    """Choose the settings that express the modules' scales, and scale the modules to fit them.

    lora_alpha is an integer, since Ollama does not read anything else. Where scale · rank is not
    one, the remaining factor is multiplied into B.

    Args:
        rslora: whether use_rslora may be set.

    Returns:
        r, lora_alpha, use_rslora and the patterns of the configuration; the modules.
    """
    # The most common values are the defaults, so that the fewest patterns are needed.
    rank = int(most_common(w.delta.rank for w in written))
    scale = most_common(w.delta.scale for w in written)
    uniform = all(w.delta.rank == rank and w.delta.scale == scale for w in written)
    rslora = (
        rslora and uniform and integer(scale * rank) is None and has_alpha(scale, rank, rslora=True)
    )
    ranks: dict[str, int] = {}
    alphas: dict[str, int] = {}
    scaled = []
    alpha = integer(scale * (math.sqrt(rank) if rslora else rank)) or rank
    for module in written:
        own_rank, own_scale = module.delta.rank, module.delta.scale
        own_alpha = integer(own_scale * (math.sqrt(own_rank) if rslora else own_rank)) or own_rank
        # Whole paths: PEFT uses the first pattern that matches the end of a path.
        pattern = re.escape(module.target.path)
        if own_rank != rank:
            ranks[pattern] = own_rank
        if own_alpha != alpha:
            alphas[pattern] = own_alpha
        # Unchanged where an integer expresses the scale, which own_alpha / own_rank might round.
        exact = has_alpha(own_scale, own_rank, rslora=rslora)
        delta = module.delta.scaled_to(own_scale if exact else own_alpha / own_rank)
        scaled.append(module._replace(delta=delta))
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return settings, scaled


def integer(value: float) -> int | None:
    """Return the integer that a float is, up to its rounding; None if it is not one above 0."""
    nearest = round(value)
    return nearest if nearest >= 1 and math.isclose(value, nearest, rel_tol=1e-12) else None


def has_alpha(scale: float, rank: int, *, rslora: bool) -> bool:
    """Whether an integer lora_alpha gives this scale at this rank."""
    return integer(scale * (math.sqrt(rank) if rslora else rank)) is not None


def tensors_of(module: Written, written: list[Written]) -> dict[str, mx.array]:
    """Return the tensors of one module under PEFT's keys.

    Args:
        written: all modules of the adapter.
    """
    target, delta = module.target, module.delta
    name = f"base_model.model.{target.module}"
    if delta.a.ndim == 3:
        # PEFT wraps a module once per parameter; the first one, gate_up_proj, is innermost.
        has_outer = any(
            w.target.module == target.module and w.target.parameter == "down_proj" for w in written
        )
        name += ".base_layer" if target.parameter == "gate_up_proj" and has_outer else ""
        experts, rank, inputs = delta.a.shape
        a = delta.a.reshape(experts * rank, inputs)
        # The expert's index varies slowest in A and fastest in B (peft/tuners/lora/layer.py).
        b = delta.b.transpose(1, 2, 0).reshape(delta.b.shape[1], rank * experts)
        return {f"{name}.lora_A.weight": mx.contiguous(a), f"{name}.lora_B.weight": b}
    a, b = mx.contiguous(delta.a), mx.contiguous(delta.b)
    if module.embedding:
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if delta.magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = delta.magnitude
    return tensors


def short_names(modules: list[str], known: set[str]) -> list[str]:
    """Return target_modules that match exactly these modules among all known ones.

    The last parts of their paths, or whole paths where these would match other modules, too.
    """
    names = sorted({module.rpartition(".")[2] for module in modules})
    if {module for module in known if module in names or ends_in(module, names)} == set(modules):
        return names
    return sorted(modules)
