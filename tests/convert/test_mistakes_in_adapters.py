"""Mistakes planted in the conversion of adapters, which verification must catch."""

from collections.abc import Callable
from sys import modules
from typing import Any

import mlx.core as mx
import pytest
from helpers.mistakes import (
    ADAPTERS,
    EXPERT_ORDER,
    WRONG,
    Arrays,
    ConvertVerified,
    Patch,
    after,
    all_of,
    before,
    swap,
)

from mlx_simpo.convert import mlx_format as mlx_format_module
from mlx_simpo.convert.names import Target
from mlx_simpo.convert.peft.write import Written
from mlx_simpo.errors import SimPOError


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("conversion", ["to-peft", "from-peft", "fuse"])
def test_without_a_mistake(conversion: str, name: str, convert_verified: ConvertVerified) -> None:
    convert_verified(conversion, name)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_base_model_without_a_mistake(name: str, convert_verified: ConvertVerified) -> None:
    convert_verified("from-hf", name)


def tensors(patch: Patch, change: Callable[[Arrays, Written], Arrays]) -> None:
    """Change the tensors of each module before they are written."""
    after(
        patch, modules["mlx_simpo.convert.peft.write"], "tensors_of", lambda t, w, _: change(t, w)
    )


def settings(patch: Patch, **changes: Callable[[Any], Any]) -> None:
    """Change entries of PEFT's configuration before it is written."""
    module = modules["mlx_simpo.convert.peft.write"]
    after(
        patch, module, "configuration", lambda c, *_: c | {n: f(c[n]) for n, f in changes.items()}
    )


def only(part: str, change: Callable[[mx.array], mx.array]) -> Callable[[Arrays, Written], Arrays]:
    """Change the tensors that have this in their names."""
    return lambda arrays, _: {n: change(a) if part in n else a for n, a in arrays.items()}


def exchanged(one: str, other: str) -> Callable[[Arrays, Written], Arrays]:
    """Exchange parts of the tensors' names."""

    def change(arrays: Arrays, _: Written) -> Arrays:
        swap = {one: other, other: one}
        parts = {n: next((p for p in swap if p in n), None) for n in arrays}
        return {n.replace(p, swap[p]) if (p := parts[n]) else n: a for n, a in arrays.items()}

    return change


def transpose_experts(arrays: Arrays, module: Written) -> Arrays:
    """Write B with the expert as its slowest index; PEFT has it as the fastest."""
    b = module.delta.b
    transposed = b.transpose(1, 0, 2).reshape(b.shape[1], -1)
    return {n: transposed if "lora_B" in n else a for n, a in arrays.items()}


def exchange_two_experts(arrays: Arrays, module: Written) -> Arrays:
    """Write A with two experts exchanged."""
    a = module.delta.a[mx.array([1, 0, 2, 3])]
    return {n: a.reshape(-1, a.shape[-1]) if "lora_A" in n else x for n, x in arrays.items()}


def without(part: str) -> Callable[[Arrays, Written], Arrays]:
    """Omit the tensors that have this in their names."""
    return lambda arrays, _: {n: a for n, a in arrays.items() if part not in n}


def no_magnitudes(patch: Patch) -> None:
    tensors(patch, without("magnitude"))
    settings(patch, use_dora=lambda _: False)


def exchange_halves(real: Target, *_: object) -> Target:
    """Return the target with the halves of gate_up_proj exchanged."""
    return real._replace(part=(1 - real.part[0], 2)) if real.part[1] == 2 else real


def writer_exchanges(patch: Patch) -> None:
    after(patch, modules["mlx_simpo.convert.peft.write"], "peft_target", exchange_halves)


def both_exchange(patch: Patch) -> None:
    parts = {"gate_proj": ("gate_up_proj", (1, 2)), "up_proj": ("gate_up_proj", (0, 2))}
    names = modules["mlx_simpo.convert.names"]
    patch.setattr(names, "_FUSED", names._FUSED | parts)


LAYER_0 = "layers.0.self_attn.q_proj.lora_B"
TO_PEFT = {
    "alpha doubled": ("llama", lambda p: settings(p, lora_alpha=lambda a: 2 * a)),
    "alpha 10 % off": ("llama", lambda p: settings(p, lora_alpha=lambda a: round(1.1 * a))),
    "rslora": ("llama", lambda p: settings(p, use_rslora=lambda r: not r)),
    "A not transposed": ("square", lambda p: tensors(p, only("lora_A", mx.transpose))),
    "B not transposed": ("square", lambda p: tensors(p, only("lora_B", mx.transpose))),
    "one A": ("square", lambda p: tensors(p, only(LAYER_0[:-1] + "A", mx.transpose))),
    "one B zero": ("llama", lambda p: tensors(p, only(LAYER_0, mx.zeros_like))),
    "one B 2 % off": ("llama", lambda p: tensors(p, only(LAYER_0, lambda b: b * 1.02))),
    "layers exchanged": ("llama", lambda p: tensors(p, exchanged("layers.0.", "layers.1."))),
    "q and o exchanged": ("llama", lambda p: tensors(p, exchanged("q_proj", "o_proj"))),
    "no magnitudes": ("dora", no_magnitudes),
    "magnitudes off": ("dora", lambda p: tensors(p, only("magnitude", lambda m: m * 1.02))),
    "experts transposed in B": ("mixtral", lambda p: tensors(p, transpose_experts)),
    "two experts exchanged": ("mixtral", lambda p: tensors(p, exchange_two_experts)),
    "gate and up exchanged": ("mixtral", writer_exchanges),
    "alpha pattern omitted": ("mixtral", lambda p: settings(p, alpha_pattern=lambda _: {})),
}


@pytest.mark.parametrize("mistake", TO_PEFT)
def test_to_peft_catches(
    mistake: str, convert_verified: ConvertVerified, monkeypatch: Patch
) -> None:
    name, plant = TO_PEFT[mistake]
    plant(monkeypatch)
    with pytest.raises(SimPOError, match=WRONG):
        convert_verified("to-peft", name)


@pytest.mark.parametrize(
    ("name", "plant", "message"),
    [
        ("llama", lambda p: tensors(p, without(LAYER_0)), "too few tensors"),
        ("llama", lambda p: tensors(p, without("layers.0.self_attn.q_proj")), "have no tensors"),
        ("dora", lambda p: tensors(p, without("magnitude")), "too few tensors"),
        ("dora", lambda p: settings(p, use_dora=lambda _: False), "too many"),
        ("mixtral", lambda p: settings(p, rank_pattern=lambda _: {}), "do not belong to rank"),
        (
            "mixtral",
            lambda p: settings(p, target_parameters=lambda t: t[:1]),
            "of its modules are not in this model",
        ),
    ],
)
def test_to_peft_notices_that_its_output_cannot_be_read(
    name: str, plant: Callable, message: str, convert_verified: ConvertVerified, monkeypatch: Patch
) -> None:
    plant(monkeypatch)
    with pytest.raises(SimPOError, match=message):
        convert_verified("to-peft", name)


def mlx_weights(patch: Patch, change: Callable[[Arrays], None]) -> None:
    """Change the MLX adapter's weights before they are written."""
    before(patch, mlx_format_module, "write_adapter", lambda _, weights, config: change(weights))


def mlx_config(patch: Patch, change: Callable[[dict], Any]) -> None:
    before(patch, mlx_format_module, "write_adapter", lambda _, w, c: change(c["lora_parameters"]))


Q = "model.layers.{}.self_attn.q_proj.lora_b"
FROM_PEFT = {
    "scale doubled": ("llama", lambda p: mlx_config(p, lambda c: c.update(scale=c["scale"] * 2))),
    "scale 10 % off": ("llama", lambda p: mlx_config(p, lambda c: c.update(scale=5.5))),
    "A not transposed": ("square", lambda p: mlx_weights(p, all_of("lora_a", mx.transpose))),
    "B not transposed": ("square", lambda p: mlx_weights(p, all_of("lora_b", mx.transpose))),
    "one B zero": ("llama", lambda p: mlx_weights(p, all_of(Q.format(1), mx.zeros_like))),
    "layers": ("llama", lambda p: mlx_weights(p, lambda w: swap(w, Q.format(0), Q.format(1)))),
    "magnitudes": ("dora", lambda p: mlx_weights(p, all_of(".m", lambda m: m * 1.02))),
    "experts": ("mixtral", lambda p: mlx_weights(p, all_of("lora_a", lambda a: a[EXPERT_ORDER]))),
}


@pytest.mark.parametrize("mistake", FROM_PEFT)
def test_from_peft_catches(
    mistake: str, convert_verified: ConvertVerified, monkeypatch: Patch
) -> None:
    name, plant = FROM_PEFT[mistake]
    plant(monkeypatch)
    with pytest.raises(SimPOError, match=WRONG):
        convert_verified("from-peft", name)
