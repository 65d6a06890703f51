"""What is known of each architecture: how its checkpoint and PEFT name what MLX holds.

Every entry of TABLE is held to transformers and PEFT by tests/parity; a rule is data, and the probe
of mlx-lm's sanitize (`probe`) checks it against the model at hand before anything is written.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import SimPOError


@dataclass(frozen=True)
class Experts:
    """Experts that MLX holds stacked: one array of shape (experts, out, in) for each projection.

    stacked: path of the module in a block of the MLX model. names: MLX's projections → the
    checkpoint's. separate: the checkpoint's path of one expert, {} being its number, or "" where
    the checkpoint has them stacked too, in ``fused``. fused: the checkpoint's fused tensors, by
    their whole names below the experts' parent → the projections in them, one behind the other on
    the axis of outputs. live: path of transformers' module (5.0 and newer), whose parameters
    gate_up_proj and down_proj hold all experts. unpaired: why PEFT adapters with a pair of matrices
    for each expert are neither written nor read.
    """

    stacked: str
    live: str
    separate: str = ""
    names: dict[str, str] = field(default_factory=dict)
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unpaired: str = ""


@dataclass(frozen=True)
class Architecture:
    """How one model type is converted.

    prefix: what MLX's names begin with and the checkpoint's do not. convolutions: suffixes of
    weights that MLX holds as (channels, width, 1) and the checkpoint as (channels, 1, width).
    renamed: parts of the checkpoint's module paths → transformers' own. parameters: modules (a
    regular expression for the end of transformers' path) whose weight PEFT reaches as a parameter
    only. no_adapter: paths in MLX (regular expressions) → why an adapter on them is refused.
    heads_split: MLX holds kv_b_proj as two arrays with a matrix a head (deepseek_v3). wrapped: the
    model sees too, and mlx-lm runs its text part alone, as language_model. deviates: why mlx-lm
    itself computes something else than transformers. refused: why nothing of this type is
    converted.
    """

    model_type: str
    note: str = "same names on both sides"
    prefix: str = ""
    experts: Experts | None = None
    convolutions: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    parameters: str = ""
    no_adapter: dict[str, str] = field(default_factory=dict)
    heads_split: bool = False
    wrapped: bool = False
    deviates: str = ""
    refused: str = ""


_SAME = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
_MLP = Experts("mlp.switch_mlp", "mlp.experts", "mlp.experts.{}", _SAME)
_MIXTRAL = Experts(
    "block_sparse_moe.switch_mlp",
    "mlp.experts",
    "block_sparse_moe.experts.{}",
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)
_GRANITE = Experts(
    "block_sparse_moe.switch_mlp",
    "block_sparse_moe.experts",
    fused={
        "input_linear.weight": ("gate_proj", "up_proj"),
        "output_linear.weight": ("down_proj",),
    },
)
_QWEN = Experts(
    "mlp.switch_mlp",
    "mlp.experts",
    fused={
        "experts.gate_up_proj": ("gate_proj", "up_proj"),
        "experts.down_proj": ("down_proj",),
    },
)
# PEFT takes these names for transformers 4's experts and looks for them in the fused ones
# (peft/utils/transformers_weight_conversion.py); named as parameters they are left alone.
_TAKEN = r"mlp\.gate|(mlp|shared_expert|shared_experts)\.(gate_proj|up_proj|down_proj)"
_STACKED = "experts stacked by MLX; PEFT names them as parameters"

_LONG = (
    "mlx-lm takes the rotary factors for long texts (longrope) at any length, transformers those "
    "for short ones too"
)
_GELU = "mlx-lm computes the exact GELU, transformers the tanh approximation of the training"
_GEMMA = Experts(
    "experts.switch_glu",
    "experts",
    fused={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
)
_TEXT = "MLX runs the text part alone; load with AutoModelForImageTextToText in transformers"
_PLAIN = """
    llama mistral qwen2 qwen3 gemma2 gemma3_text gemma4_text phi phi3 smollm3 olmo2 granite
    cohere cohere2 glm4 stablelm
"""

TABLE: dict[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        *(Architecture(name) for name in _PLAIN.split()),
        *(Architecture(name, deviates=_GELU) for name in ("gemma", "starcoder2")),
        Architecture("lfm2", "convolutions transposed by MLX", convolutions=("conv.conv.weight",)),
        Architecture(
            "qwen3_5_text",
            "MLX puts language_model. before every name and 1 on top of norms",
            prefix="language_model.",
            convolutions=("conv1d.weight",),
        ),
        Architecture(
            "mixtral",
            _STACKED,
            experts=_MIXTRAL,
            renamed=(("block_sparse_moe.", "mlp."),),
            parameters=r"mlp\.gate",
        ),
        Architecture(
            "phimoe",
            _STACKED,
            experts=replace(_MIXTRAL, unpaired="PEFT does not join single experts of phimoe"),
            renamed=(("block_sparse_moe.gate", "mlp.router"),),
            parameters=r"mlp\.router",
        ),
        *(
            Architecture(name, _STACKED, experts=_MLP, parameters=_TAKEN)
            for name in ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2")
        ),
        Architecture(
            "deepseek_v3",
            f"{_STACKED}; kv_b_proj split by heads in MLX, no adapter on it",
            experts=_MLP,
            parameters=_TAKEN,
            no_adapter={r"kv_b_proj|embed_q|unembed_out": "MLX holds kv_b_proj split by heads"},
            heads_split=True,
        ),
        Architecture(
            "granitemoe",
            f"gate and up projections fused in the checkpoint; {_STACKED}",
            experts=_GRANITE,
            renamed=(("router.layer", "router"),),
            parameters=r"block_sparse_moe\.router",
        ),
        Architecture("gpt_oss", refused="its experts' gate and up rows are interleaved and packed"),
        Architecture("gpt2", refused="its layers are transposed convolutions, not linear layers"),
        *(Architecture(name, _TEXT, wrapped=True) for name in ("gemma3", "mistral3")),
        Architecture("gemma4", f"{_TEXT}; {_STACKED}", wrapped=True, experts=_GEMMA),
        Architecture("qwen3_5", _TEXT, wrapped=True, convolutions=("conv1d.weight",)),
        Architecture(
            "qwen3_5_moe",
            f"{_TEXT}; {_STACKED}",
            wrapped=True,
            convolutions=("conv1d.weight",),
            experts=_QWEN,
            parameters=r"mlp\.gate",
        ),
    )
}


def deviation(config: dict[str, Any]) -> str:
    """Why mlx-lm and transformers differ on models of this type; empty if they do not, or if it is
    not known."""
    found = TABLE.get(str(config.get("model_type")))
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(scaling, dict) and {"longrope", "su"} & {
        scaling.get(name) for name in ("rope_type", "type") if isinstance(scaling.get(name), str)
    }:
        return _LONG
    return found.deviates if found else ""


def architecture_of(config: dict[str, Any]) -> Architecture | None:
    """The table's entry for a config.json; None if the model type is not in the table.

    Raises:
        SimPOError: the table has it, as one that is not converted.
    """
    found = TABLE.get(str(config.get("model_type")))
    if found is not None and found.refused:
        raise SimPOError(
            f"models of type {found.model_type} are not converted: {found.refused} (see "
            "`mlx-simpo convert architectures`)"
        )
    return found


def refuse_adapter_on(path: str, architecture: Architecture) -> None:
    """SimPOError if an adapter on the layer at this path of the MLX model is not converted."""
    for pattern, reason in architecture.no_adapter.items():
        if re.search(pattern, path):
            raise SimPOError(
                f"the adapter's {path} cannot be converted for {architecture.model_type}: "
                f"{reason}; fuse the model instead (mlx-simpo fuse)"
            )
