"""What the engines are tried on."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import BARE, tiny_folder
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3_5 import GatedDeltaNet

from mlx_simpo import SimPOError
from mlx_simpo.doctor.examples import loaded_example, random_examples
from mlx_simpo.reporting.display import Display


def test_the_random_models_have_heads_of_64_and_the_delta_rule() -> None:
    llama, hybrid = random_examples()
    assert llama.model.args.head_dim == 64
    is_delta = [isinstance(m, GatedDeltaNet) for m in hybrid.model.modules()]
    assert sum(is_delta) == 3
    for example in (llama, hybrid):
        assert example.describe_model()["dtype"] == "float32"
        assert len({pair.length for pair in example.pairs}) == len(example.pairs)
        assert example.tokens == sum(
            2 * lengths["prompt"] + lengths["chosen"] + lengths["rejected"]
            for lengths in example.describe_pairs()["lengths"]
        )


def test_no_lora_weight_is_zero_so_that_every_gradient_counts() -> None:
    llama, _ = random_examples()
    weights = dict(tree_flatten(llama.model.trainable_parameters()))
    assert weights
    for name, weight in weights.items():
        assert "lora" in name
        assert isinstance(weight, mx.array)
        assert np.abs(np.array(weight)).max() > 0.01


def test_random_pairs_are_the_same_each_time() -> None:
    first, second = (next(iter(random_examples())) for _ in range(2))
    for one, two in zip(first.pairs, second.pairs, strict=True):
        np.testing.assert_array_equal(one.chosen.tokens, two.chosen.tokens)


@pytest.mark.parametrize("template", [None, BARE])
def test_a_model_gets_the_built_in_texts_by_its_own_template(
    template: str | None, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "model", template=template)
    example = loaded_example(str(folder), Display())
    lengths = example.describe_pairs()["lengths"]
    assert len(lengths) == 5
    prompts = [each["prompt"] for each in lengths]
    assert max(prompts) > 5 * min(prompts)
    assert all(each["chosen"] > 1 and each["rejected"] > 1 for each in lengths)
    assert example.describe_model() | {"name": ""} == {
        "name": "",
        "model_type": "llama",
        "random": False,
        "layers": 2,
        "dtype": "float32",
    }


def test_a_template_that_rejects_the_built_in_texts(tmp_path: Path) -> None:
    template = "{{ raise_exception('only in verse') }}"
    folder = tiny_folder(tmp_path / "model", template=template)
    with pytest.raises(SimPOError, match=r"cannot be trained on the built-in texts: .*in verse"):
        loaded_example(str(folder), Display())
