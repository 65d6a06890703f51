"""The SimPO loss of a llama model with LoRA in plain NumPy float64: what the package is held to.

Written from the papers and mlx-lm's definition of the architecture alone: no code is shared with
the package, and gradients are central differences. T: tokens, D: hidden size, H: heads, G:
key/value heads, K: head size, V: vocabulary, r: LoRA rank.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Tokens = Sequence[int] | np.ndarray
Weights = Mapping[str, np.ndarray]
TokenizedSequence = tuple[Tokens, int]  # the tokens, and the index of the first one that is scored


def _get(weights: Weights, name: str) -> np.ndarray:
    return np.asarray(weights[name], dtype=np.float64)


def _linear(weights: Weights, name: str, x: np.ndarray, lora_scale: float) -> np.ndarray:
    """x [T, in] to [T, out]: x Wᵀ + scale · (x A) B, with W [out, in], A [in, r], B [r, out].

    Hu et al. 2021, "LoRA", eq. 3, laid out as in mlx_lm/tuner/lora.py: a layer with LoRA has its
    W under "<name>.linear", a layer without has it directly under "<name>".
    """
    if f"{name}.lora_a" not in weights:
        return x @ _get(weights, f"{name}.weight").T
    a, b = _get(weights, f"{name}.lora_a"), _get(weights, f"{name}.lora_b")
    return x @ _get(weights, f"{name}.linear.weight").T + lora_scale * (x @ a @ b)


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x [T, D], weight [D] to [T, D]: x / √(mean x² + eps) · weight (Zhang & Sennrich 2019)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rope(x: np.ndarray, theta: float) -> np.ndarray:
    """x [heads, T, K] to the same: elements i and i + K/2 of each head are rotated, as a pair, by
    t · theta^(-2i/K) (Su et al. 2021, "RoFormer"; mlx's nn.RoPE, not traditional, not scaled)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[-2])[:, None] * float(theta) ** (-np.arange(half) / half)  # [T, K/2]
    a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attention_in_float64(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float,
    visible: np.ndarray | bool, sinks: Sequence[float] | None = None,
) -> np.ndarray:  # fmt: skip
    """softmax(scale · QKᵀ) V, head by head: [n, H, T, D], [n, K, S, D], [n, K, S, E] → [n, H, T, E]

    visible: which scores count, of a shape that broadcasts to [n, H, T, S]. sinks: a score of each
    head that has a share of the softmax and no value.
    """
    out = np.zeros((*queries.shape[:3], values.shape[-1]))
    seen = np.broadcast_to(visible, (*queries.shape[:3], keys.shape[2]))
    for n, head in np.ndindex(queries.shape[:2]):
        kv_head = head * keys.shape[1] // queries.shape[1]
        scores = np.where(seen[n, head], scale * queries[n, head] @ keys[n, kv_head].T, -np.inf)
        least = scores.max(axis=-1, keepdims=True)
        sink = np.zeros_like(least)
        if sinks is not None:
            least = np.maximum(least, sinks[head])
            sink = np.exp(sinks[head] - least)
        share = np.exp(scores - least)
        share = share / (share.sum(axis=-1, keepdims=True) + sink)
        out[n, head] = share @ values[n, kv_head]
    return out


def llama_logits(
    weights: Weights, tokens: Tokens, *, heads: int, kv_heads: int, rope_theta: float, eps: float,
    lora_scale: float,
) -> np.ndarray:  # fmt: skip
    """The logits [T, V] of one sequence of tokens [T]; row t predicts token t + 1.

    weights: the parameters by their flat names, as from dict(tree_flatten(model.parameters())) of
    an mlx-lm llama (mlx_lm/models/llama.py). Without an "lm_head" the head is the embedding. What
    is not computed here (biases, quantized layers, DoRA) is a ValueError, never ignored.
    """
    if strange := [n for n in weights if not n.endswith((".weight", ".lora_a", ".lora_b"))]:
        raise ValueError(f"neither a plain weight nor LoRA: {strange}")
    embedding = _get(weights, "model.embed_tokens.weight")  # [V, D]
    h = embedding[np.asarray(tokens)]  # [T, D]
    future = np.triu(np.ones((len(h), len(h)), dtype=bool), k=1)
    layers = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("model.layers."))
    for layer in (f"model.layers.{i}" for i in range(layers)):
        x = _rms_norm(h, _get(weights, f"{layer}.input_layernorm.weight"), eps)
        q, k, v = (
            _linear(weights, f"{layer}.self_attn.{p}_proj", x, lora_scale)
            .reshape(len(x), n, -1)
            .swapaxes(0, 1)
            for p, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )  # [H, T, K], [G, T, K], [G, T, K]
        q, k = _rope(q, rope_theta), _rope(k, rope_theta)
        # Head i attends with key/value head i // (H / G) (Ainslie et al. 2023, "GQA").
        k, v = (np.repeat(a, heads // kv_heads, axis=0) for a in (k, v))
        scores = np.where(future, -np.inf, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))  # [H, T, T]
        p = np.exp(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))
        out = (p @ v).swapaxes(0, 1).reshape(len(h), -1)
        h = h + _linear(weights, f"{layer}.self_attn.o_proj", out, lora_scale)
        x = _rms_norm(h, _get(weights, f"{layer}.post_attention_layernorm.weight"), eps)
        gate = _linear(weights, f"{layer}.mlp.gate_proj", x, lora_scale)
        x = gate / (1 + np.exp(-gate)) * _linear(weights, f"{layer}.mlp.up_proj", x, lora_scale)
        h = h + _linear(weights, f"{layer}.mlp.down_proj", x, lora_scale)
    h = _rms_norm(h, _get(weights, "model.norm.weight"), eps)
    tied = not any(n.startswith("lm_head.") for n in weights)
    return h @ embedding.T if tied else _linear(weights, "lm_head", h, lora_scale)


def simpo_loss(
    weights: Weights, pairs: Sequence[tuple[TokenizedSequence, TokenizedSequence]], *, beta: float,
    gamma_beta_ratio: float, **model: Any,
) -> float:  # fmt: skip
    """The mean over pairs of -log σ(β · (mean log p of chosen - mean log p of rejected) - γ), with
    γ = β · gamma_beta_ratio (Meng et al. 2024, "SimPO", eq. 6).

    pairs: ((chosen tokens, start), (rejected tokens, start)); what is before start is the prompt,
    not scored. model: heads, kv_heads, rope_theta, eps and lora_scale, as for llama_logits.
    """

    def mean_logp(tokens: Tokens, start: int) -> float:
        if not 0 < start < len(tokens):
            raise ValueError(f"cannot score {len(tokens)} tokens from {start}")
        x = llama_logits(weights, tokens, **model)[start - 1 : -1]  # row t - 1 predicts token t
        log_sum = np.logaddexp.reduce(x, axis=-1)
        return float(np.mean(x[np.arange(len(x)), np.asarray(tokens)[start:]] - log_sum))

    margins = np.array([mean_logp(*chosen) - mean_logp(*rejected) for chosen, rejected in pairs])
    z = beta * margins - beta * gamma_beta_ratio
    return float(np.mean(np.logaddexp(0, -z)))  # -log σ(z) = log(1 + e^-z)


def finite_difference(
    f: Callable[[dict[str, np.ndarray]], float], weights: Weights, name: str,
    index: tuple[int, ...], step: float = 1e-5,
) -> float:  # fmt: skip
    """∂f/∂weights[name][index], as (f(w + step) - f(w - step)) / (2 step); the entry is moved in
    float64, in a copy: weights stays as it is."""
    up, down = (np.array(weights[name], dtype=np.float64) for _ in range(2))
    up[index] += step
    down[index] -= step
    return (f({**weights, name: up}) - f({**weights, name: down})) / (2 * step)
