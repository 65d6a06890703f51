"""What is known of each model type: the names of its tensors in checkpoints, in PEFT and in MLX.

tests/parity compares every entry of TABLE with transformers and PEFT. A rule is data; the probe of
mlx-lm's sanitize (`probe`) checks it against the model at hand before anything is written.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import SimPOError


@dataclass(frozen=True)
class Experts:
    """Experts that MLX stacks: one array of shape (experts, out, in) per projection.

    mlx_path: path of the stacked module within a layer of the MLX model. transformers_path: path of
    transformers' module (5.0 and newer), whose parameters gate_up_proj and down_proj hold all
    experts. checkpoint_path: path of a single expert in the checkpoint, with {} for its index; ""
    where the checkpoint holds the experts stacked, too, in ``fused_tensors``. projections: MLX's
    names of the projections → the checkpoint's. fused_tensors: the checkpoint's fused tensors,
    named relative to the experts' parent → the projections that each concatenates along its output
    axis. single_unsupported: why PEFT adapters with a pair of matrices for each expert are neither
    written nor read; "" if they are.
    """

    mlx_path: str
    transformers_path: str
    checkpoint_path: str = ""
    projections: dict[str, str] = field(default_factory=dict)
    fused_tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    single_unsupported: str = ""


@dataclass(frozen=True)
class Architecture:
    """How models of one type are converted.

    note: the rule in a few words, for people. prefix: what MLX puts before the checkpoint's names.
    convolutions: suffixes of weights that MLX stores as (channels, width, 1) and the checkpoint as
    (channels, 1, width). renamed: parts of the checkpoint's module paths → transformers' own.
    parameters: a regular expression for the end of transformers' module paths whose weight PEFT
    reaches only as a parameter. unadaptable: regular expressions for paths in MLX → why an adapter
    on them is not converted. splits_kv_b_proj: MLX holds kv_b_proj as two arrays with one matrix
    per head (deepseek_v3). vision_language: a vision-language model, of which mlx-lm runs only the
    text part, as language_model. deviation: why mlx-lm itself computes something else than
    transformers; "" if it does not. unsupported: why models of this type are not converted at all;
    "" if they are.
    """

    model_type: str
    note: str = "same names on both sides"
    prefix: str = ""
    experts: Experts | None = None
    convolutions: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    parameters: str = ""
    unadaptable: dict[str, str] = field(default_factory=dict)
    splits_kv_b_proj: bool = False
    vision_language: bool = False
    deviation: str = ""
    unsupported: str = ""


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
    fused_tensors={
        "input_linear.weight": ("gate_proj", "up_proj"),
        "output_linear.weight": ("down_proj",),
    },
)
_QWEN = Experts(
    "mlp.switch_mlp",
    "mlp.experts",
    fused_tensors={
        "experts.gate_up_proj": ("gate_proj", "up_proj"),
        "experts.down_proj": ("down_proj",),
    },
)
# PEFT takes modules of these names for the single experts of transformers 4 and redirects them to
# the fused ones (peft/utils/transformers_weight_conversion.py), except if named as parameters.
_MISTAKEN_FOR_EXPERTS = (
    r"mlp\.gate|(mlp|shared_expert|shared_experts)\.(gate_proj|up_proj|down_proj)"
)
_STACKED = "experts stacked by MLX and named as parameters by PEFT"

_LONG = (
    "mlx-lm uses the rotary factors for long texts (longrope) at any length, transformers uses "
    "those for short texts up to the original context length"
)
_GELU = (
    "mlx-lm computes the exact GELU, transformers the tanh approximation that the models were "
    "trained with"
)
_GEMMA = Experts(
    "experts.switch_glu",
    "experts",
    fused_tensors={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
)
_TEXT = "MLX runs only the text part; load it with AutoModelForImageTextToText in transformers"
_SAME_NAMES = """
    llama mistral qwen2 qwen3 gemma2 gemma3_text gemma4_text phi phi3 smollm3 olmo2 granite
    cohere cohere2 glm4 stablelm
"""

TABLE: dict[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        *(Architecture(name) for name in _SAME_NAMES.split()),
        *(Architecture(name, deviation=_GELU) for name in ("gemma", "starcoder2")),
        Architecture("lfm2", "convolutions transposed by MLX", convolutions=("conv.conv.weight",)),
        Architecture(
            "qwen3_5_text",
            "MLX puts language_model. before every name and adds 1 to the norms",
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
            experts=replace(
                _MIXTRAL, single_unsupported="PEFT does not join single experts of phimoe"
            ),
            renamed=(("block_sparse_moe.gate", "mlp.router"),),
            parameters=r"mlp\.router",
        ),
        *(
            Architecture(name, _STACKED, experts=_MLP, parameters=_MISTAKEN_FOR_EXPERTS)
            for name in ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2")
        ),
        Architecture(
            "deepseek_v3",
            f"{_STACKED}; kv_b_proj split by heads in MLX and not adaptable",
            experts=_MLP,
            parameters=_MISTAKEN_FOR_EXPERTS,
            unadaptable={r"kv_b_proj|embed_q|unembed_out": "MLX holds kv_b_proj split by heads"},
            splits_kv_b_proj=True,
        ),
        Architecture(
            "granitemoe",
            f"gate and up projections fused in the checkpoint; {_STACKED}",
            experts=_GRANITE,
            renamed=(("router.layer", "router"),),
            parameters=r"block_sparse_moe\.router",
        ),
        Architecture(
            "gpt_oss", unsupported="its experts' gate and up rows are interleaved and packed"
        ),
        Architecture(
            "gpt2", unsupported="its layers are transposed convolutions, not linear layers"
        ),
        *(Architecture(name, _TEXT, vision_language=True) for name in ("gemma3", "mistral3")),
        Architecture("gemma4", f"{_TEXT}; {_STACKED}", vision_language=True, experts=_GEMMA),
        Architecture("qwen3_5", _TEXT, vision_language=True, convolutions=("conv1d.weight",)),
        Architecture(
            "qwen3_5_moe",
            f"{_TEXT}; {_STACKED}",
            vision_language=True,
            convolutions=("conv1d.weight",),
            experts=_QWEN,
            parameters=r"mlp\.gate",
        ),
    )
}


def known_deviation(config: dict[str, Any]) -> str:
    """Return why mlx-lm computes something else than transformers on models with this config.json.

    Returns:
        The reason; "" if the two agree, or if no reason is known.
    """
    entry = TABLE.get(str(config.get("model_type")))
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    # transformers writes the type of scaling as rope_type, older checkpoints as type; longrope was
    # called su at first.
    if isinstance(scaling, dict) and {"longrope", "su"} & {
        scaling.get(name) for name in ("rope_type", "type") if isinstance(scaling.get(name), str)
    }:
        return _LONG
    return entry.deviation if entry else ""


def table_entry(config: dict[str, Any]) -> Architecture | None:
    """Return TABLE's entry for a config.json; None if its model type is not in the table.

    Raises:
        SimPOError: the model type is known not to be convertible.
    """
    entry = TABLE.get(str(config.get("model_type")))
    if entry is not None and entry.unsupported:
        raise SimPOError(
            f"models of type {entry.model_type} are not converted: {entry.unsupported} (see "
            "`mlx-simpo convert architectures`)"
        )
    return entry


def check_adaptable(path: str, architecture: Architecture) -> None:
    """Check that an adapter on one layer can be converted.

    Args:
        path: of the layer in the MLX model.

    Raises:
        SimPOError: it cannot, for a reason that the architecture's rule names.
    """
    for pattern, reason in architecture.unadaptable.items():
        if re.search(pattern, path):
            raise SimPOError(
                f"the adapter's {path} cannot be converted for {architecture.model_type}: "
                f"{reason}; fuse the model instead (mlx-simpo fuse)"
            )
