"""SmolLM2, a real model, both ways: the commands' own verification with torch in it, an adapter of
a 4-bit base, and the demo's adapter answering in transformers as it does in mlx_lm."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_map
from mlx_lm import generate
from parity.zoo import torch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlx_simpo import (
    LoRAConfig,
    from_hf,
    from_peft,
    fuse,
    load_adapter,
    load_config,
    load_model,
    to_peft,
    train,
)
from mlx_simpo.convert.verify.compare import mlx_logits, sample_tokens
from mlx_simpo.model.adapters import save_adapter
from mlx_simpo.model.lora import attach_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]
ROOT = Path(__file__).parents[2]
QUESTIONS = (
    "Tell me something nice about rain.",
    "How does a rainbow form?",
    "Name three uses of a lemon.",
)


def random_adapter(model: Path, folder: Path, **settings: Any) -> Path:
    """An mlx-lm adapter on all linear layers that moves logits by several units."""
    loaded = load_model(str(model))
    config = attach_lora(loaded.model, LoRAConfig(rank=4, **settings), seed=5)
    mx.random.seed(6)
    start = loaded.model.trainable_parameters()
    loaded.model.update(tree_map(lambda p: p + mx.random.normal(p.shape) * 0.02, start))
    return save_adapter(folder, loaded.model, {"model": str(model), **config})


@pytest.mark.parametrize("settings", [{"dora": True}, {"scale": 1.23}], ids=str)
def test_to_peft_and_back(settings: dict, smollm2_folder: Path, tmp_path: Path) -> None:
    """Verified by the command: in MLX, and by PEFT within 1e-3 of the base's own difference."""
    adapter = random_adapter(smollm2_folder, tmp_path / "mlx", **settings)
    there = to_peft(adapter, tmp_path / "peft", verify=True)
    back = from_peft(there.output, tmp_path / "back", verify=True)
    for done in (there, back):
        assert len(done.comparisons) == 2
        assert [c.agreement for c in done.comparisons] == [1.0, 1.0]
        assert all(
            c.limit is not None and c.largest <= min(c.limit, 1e-3) for c in done.comparisons
        )
    print(f"\n{settings}: {there.comparisons[1]}")


def test_an_adapter_trained_by_peft(smollm2_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    settings = LoraConfig(
        r=8, lora_alpha=12, target_modules="all-linear", rank_pattern={"q_proj": 3}
    )
    model = get_peft_model(base, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.03)
    model.save_pretrained(tmp_path / "peft")
    done = from_peft(tmp_path / "peft", tmp_path / "mlx", model=str(smollm2_folder), verify=True)
    assert len(done.comparisons) == 2
    assert all(c.agreement == 1.0 and c.largest <= 1e-3 for c in done.comparisons)


def test_an_adapter_of_a_4_bit_base(smollm2_4bit: Path, tmp_path: Path) -> None:
    """Applied by PEFT to the base unpacked in float32, it is the live 4-bit model's equal."""
    adapter = random_adapter(smollm2_4bit, tmp_path / "mlx")
    peft = to_peft(adapter, tmp_path / "peft", verify=True).output
    unpacked = fuse(tmp_path / "base", model=str(smollm2_4bit), verify=True).output
    live = load_model(str(smollm2_4bit))
    load_adapter(live.model, adapter)
    tokens = sample_tokens(live)
    with torch.no_grad():
        theirs = torch_model(unpacked, peft)(torch.tensor(tokens)).logits.numpy()
    ours = mlx_logits(live.model, tokens)
    print(f"\n4-bit base: {np.abs(theirs - ours).max():.1e}")
    assert np.abs(theirs - ours).max() <= 1e-3
    assert (theirs.argmax(-1) == ours.argmax(-1)).all()


def test_fused(smollm2_folder: Path, tmp_path: Path) -> None:
    adapter = random_adapter(smollm2_folder, tmp_path / "mlx")
    done = fuse(tmp_path / "fused", adapter=adapter, verify=True)
    assert len(done.comparisons) == 2
    assert all(c.agreement == 1.0 and c.largest <= 1e-3 for c in done.comparisons)


def test_from_hugging_face(smollm2_folder: Path, tmp_path: Path) -> None:
    done = from_hf(str(smollm2_folder), tmp_path / "mlx", verify=True)
    assert [c.largest <= 1e-3 for c in done.comparisons] == [True] * 3
    packed = from_hf(str(smollm2_folder), tmp_path / "packed", quantize=8, verify=True)
    assert packed.comparisons[0].largest <= 1e-3
    assert packed.comparisons[1].limit is None


def test_the_demo_answers_in_transformers_as_in_mlx_lm(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    settings = [f"model={smollm2_folder}", f"output={tmp_path / 'run'}"]
    settings += [f"data.{split}={ROOT / 'examples' / split}.jsonl" for split in ("train", "valid")]
    run = train(load_config(ROOT / "configs" / "demo.yaml", settings)).adapter
    peft = to_peft(run, tmp_path / "peft", verify=True).output
    theirs = torch_model(smollm2_folder, peft)
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_folder)
    ours = load_model(str(smollm2_folder))
    load_adapter(ours.model, run)
    for question in QUESTIONS:
        turn = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([ids]), max_new_tokens=60, do_sample=False, pad_token_id=0
            )
        answer = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        expected = generate(ours.model, ours.tokenizer, ids, max_tokens=60)
        print(f"\n{question} {answer!r}")
        assert answer == expected
        assert answer.startswith("In short")
