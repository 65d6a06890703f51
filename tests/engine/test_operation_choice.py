"""Which attention a model's layers compute with, on a CPU and on a stand-in for a GPU, and what the
user is told about it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.architectures import architecture_with_lora
from helpers.devices import on_cpu, on_stand_in_gpu
from helpers.fused import (
    LEAST_QUERIES,
    MARK,
    Defect,
    FusedAttention,
    failing,
    fused_attention_stand_in,
    not_a_number,
    wrong_in_bfloat16,
    wrong_keys,
    wrong_with_fewer_queries,
)
from helpers.gradients import greatest_difference, run
from helpers.steps import weights
from helpers.tiny import token_pair as pair
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.base import create_causal_mask

from mlx_simpo import SimPOConfig, SimPOError, TrainConfig, train_steps
from mlx_simpo.data.encode import EncodedPair
from mlx_simpo.engine import operation_choice
from mlx_simpo.engine.attention import attention
from mlx_simpo.engine.attention_shapes import AttentionShape
from mlx_simpo.engine.choice import Engine, choose_engine, shared_prefix_engine
from mlx_simpo.engine.figures import CPU, GPU
from mlx_simpo.engine.fused_attention import mlx_attention, primitive_count
from mlx_simpo.engine.gradient_checkpointing import gradient_checkpointing
from mlx_simpo.engine.operation_choice import (
    AttentionSetting,
    attention_in_blocks,
    choose_attention,
    choose_operations,
    fused_attention,
)
from mlx_simpo.engine.operations import AttentionCall

PAIRS = [pair(40, 20, 7), pair(35, 3, 60)]
# Whose layers all have attention that can be exchanged, in some with windows.
SAME_LAYERS = ["llama", "mistral", "qwen3", "gemma", "gemma3_text", "phi3", "mixtral", "granite"]
# Another pass costs next to nothing, so that some passes are of few tokens.
FUSED = replace(GPU, pass_cost=1, attention="mlx", source="measured in a test")
AGREES = "attention: MLX's fused operation, whose gradient agrees with that of the blocks"
IN_EVALUATION = ", MLX's operation in evaluation"
WRONG = (
    "MLX's attention with head size 8 is off by 0.1 of the largest entry in the gradient of keys"
)


def engine_of(model: Any, setting: AttentionSetting = "auto", figures: Any = FUSED) -> Engine:
    return shared_prefix_engine(model, attention=setting, figures=figures)


def note_of(model: Any, setting: AttentionSetting = "auto", figures: Any = FUSED) -> str:
    return choose_operations(model, setting, figures).note


def fused_calls(model: Any, engine: Engine, pairs: Sequence[EncodedPair] = PAIRS) -> int:
    """How many fused gradients the graph of a training step's gradient has; nothing is run."""
    arrays = engine.collate(pairs).arrays

    def total(model: nn.Module) -> mx.array:
        return engine.logps(model, arrays, training=True).sum()

    _, gradients = nn.value_and_grad(model, total)(model)
    flat: Any = tree_flatten(gradients)
    return primitive_count(MARK, *(array for _, array in flat))


def expected_calls(
    model: Any, engine: Engine, pairs: Sequence[EncodedPair] = PAIRS, *, checkpointing: bool = False
) -> int:
    """One a layer and pass, but for passes of so few tokens that a GPU would not fuse them.

    Of a prefix's last layer only keys and values are used, and its attention has no gradient;
    unless the layer is checkpointed as a whole, or the pass goes on with a response, as that of a
    single pair does.
    """
    prefix, groups = engine.collate(pairs).arrays[:2]
    lengths = [prefix.shape[1], *(tokens.shape[1] for tokens, _ in groups)]
    assert any(length < LEAST_QUERIES for length in lengths)
    passes = sum(length >= LEAST_QUERIES for length in lengths)
    return len(model.layers) * passes - (not checkpointing and len(pairs) > 1)


def in_bfloat16(model: Any) -> Any:
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
    return model


# --- on a CPU ----------------------------------------------------------------------------------


@pytest.fixture
def cpu() -> Iterator[None]:
    with on_cpu():
        yield


@pytest.mark.usefixtures("cpu")
def test_a_cpu_computes_in_blocks() -> None:
    model = architecture_with_lora()
    choice = choose_operations(model, "auto", CPU)
    assert choice.note == (
        "attention: blocks (mlx-simpo's own; MLX's gradient on the CPU would store all scores)"
    )
    assert choice.training == choice.evaluation


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("setting", ["mlx", "blocks", "auto"])
def test_a_setting_forces_one_on_a_cpu_too(setting: Any, training: bool) -> None:
    """While training and in evaluation; both are the same but for rounding."""
    model = architecture_with_lora("mistral")
    with fused_attention_stand_in(gpu=False) as stand_in:
        engine = engine_of(model, setting, CPU)
        arrays = engine.collate(PAIRS).arrays
        stand_in.forward.clear()
        logps = np.array(engine.logps(model, arrays, training=training))
        passes = 1 + len(arrays[1])
        assert len(stand_in.forward) == (len(model.layers) * passes if setting == "mlx" else 0)
    blocks = engine_of(model, "blocks", CPU)
    expected = np.array(blocks.logps(model, arrays, training=training))
    np.testing.assert_allclose(logps, expected, atol=1e-5)


@pytest.mark.usefixtures("cpu")
def test_the_note_says_that_a_setting_forces_one() -> None:
    model = architecture_with_lora()
    assert note_of(model, "blocks", CPU) == "attention: blocks, as engine.attention=blocks asks"
    assert note_of(model, "mlx", CPU) == (
        "attention: MLX's operation, as engine.attention=mlx asks (its gradient is not fused for "
        "head size 8 in float32)"
    )


@pytest.mark.usefixtures("cpu")
def test_models_without_an_attention_that_can_be_exchanged() -> None:
    for name in ("gemma2", "mamba"):
        model = architecture_with_lora(name)
        assert note_of(model, "auto", CPU) == "attention: the model's own, if it has any"
        assert note_of(model, "mlx", CPU) == "attention: the model's own, if it has any"


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [(name, nullcontext) for name in SAME_LAYERS]
    + [(name, gradient_checkpointing) for name in ("llama", "mistral")],
)
def test_a_gpu_takes_the_fused_gradient_and_it_is_the_same(
    name: str, checkpointing: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer and pass, where it is fused; sliding windows and few tokens take the blocks."""
    in_blocks: list[tuple] = []

    def recording(queries: mx.array, *rest: Any) -> mx.array:
        in_blocks.append((queries.shape[2], rest[3]))
        return attention(queries, *rest)

    monkeypatch.setattr(operation_choice, "attention", recording)
    model = architecture_with_lora(name)
    windows = {"mistral": 1, "gemma3_text": 2}.get(name, 0)
    expected = run(model, engine_of(model, "blocks"), PAIRS)
    with fused_attention_stand_in() as stand_in, checkpointing(model):
        engine = engine_of(model)
        in_blocks.clear()
        calls = fused_calls(model, engine)
        assert all(not isinstance(mask, mx.array) for _, _, mask in stand_in.backward)
        assert any(length < LEAST_QUERIES for length, _ in in_blocks)
        assert all(n < LEAST_QUERIES or isinstance(mask, mx.array) for n, mask in in_blocks)
        actual = run(model, engine, PAIRS)
    most = expected_calls(model, engine, checkpointing=checkpointing is gradient_checkpointing)
    # Where a layer's window is longer than a pass, its mask is causal, and it is fused as well.
    assert calls == most if not windows else (len(model.layers) - windows) <= calls < most
    assert greatest_difference(actual, expected) < 1e-4


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "gemma4_text", "longcat_flash", "mamba"])
def test_layers_of_several_kinds(name: str) -> None:
    """Attention beside recurrent layers, heads of two sizes, additive masks, no attention."""
    model = architecture_with_lora(name)
    expected = run(model, engine_of(model, "blocks"), PAIRS)
    with fused_attention_stand_in():
        engine = engine_of(model)
        calls = fused_calls(model, engine)
        actual = run(model, engine, PAIRS)
    has_plain = name not in ("longcat_flash", "mamba")
    assert bool(calls) == has_plain == (AGREES in engine.note)
    assert greatest_difference(actual, expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "note"),
    [
        (
            "longcat_flash",
            "attention: MLX's operations, for sinks or masks that add to the scores",
        ),
        ("llama", AGREES + IN_EVALUATION),
        ("mistral", f"{AGREES}, blocks for sliding windows{IN_EVALUATION}"),
        ("gemma2", "attention: the model's own, if it has any"),
    ],
)
def test_the_note_on_a_gpu(name: str, note: str) -> None:
    with fused_attention_stand_in():
        assert note_of(architecture_with_lora(name)) == note


DEFECTS = [
    (wrong_keys, f"{WRONG} with "),
    (wrong_with_fewer_queries, "of the largest entry in the gradient of "),
    (not_a_number, "MLX's attention with head size 8 is not a number in the gradient of values"),
    (failing, "does not run here ([metal::Device] Unable to load kernel sdpa_vjp_ds_64)"),
]


@pytest.mark.parametrize("checkpointing", [nullcontext, gradient_checkpointing])
@pytest.mark.parametrize(("defect", "text"), DEFECTS)
def test_a_wrong_gradient_is_said_and_the_blocks_compute(
    defect: Defect, text: str, checkpointing: Callable
) -> None:
    model = architecture_with_lora()
    expected = run(model, engine_of(model, "blocks"), PAIRS)
    with fused_attention_stand_in(defect), checkpointing(model):
        engine = engine_of(model)
        assert "attention: blocks (MLX's attention with head size 8 " in engine.note
        assert text in engine.note
        assert engine.note.count(IN_EVALUATION) == 1  # which needs no gradient
        assert fused_calls(model, engine) == 0
        assert greatest_difference(run(model, engine, PAIRS), expected) < 1e-6


def test_a_wrong_gradient_in_one_dtype_is_said_for_models_of_that_dtype() -> None:
    with fused_attention_stand_in(wrong_in_bfloat16):
        engine = engine_of(model := architecture_with_lora())
        assert AGREES in engine.note
        assert fused_calls(model, engine) == expected_calls(model, engine)
        engine = engine_of(model := in_bfloat16(architecture_with_lora()))
        assert "attention: blocks (MLX's attention with head size 8 is off by 0.1" in engine.note
        assert " of the largest entry in the gradient of keys with " in engine.note
        assert "(bfloat16, where 0.04 is rounding)" in engine.note
        assert fused_calls(model, engine) == 0


def test_the_engine_of_a_run_on_a_gpu() -> None:
    """Chosen as a run does, with the kernel for log-probabilities, and tried on the model."""
    model = architecture_with_lora()
    with on_stand_in_gpu(), fused_attention_stand_in(gpu=False):
        engine = choose_engine("shared_prefix", model, figures=FUSED)
        assert f"; {AGREES}{IN_EVALUATION}; log-probabilities: the Metal kernel" in engine.note
        assert fused_calls(model, engine) == expected_calls(model, engine)


def train(
    model: Any, engine: Engine, pairs: Sequence[EncodedPair] = PAIRS, *, checkpointing: bool = False
) -> dict[str, np.ndarray]:
    """The weights after two optimizer steps."""
    settings = TrainConfig(
        batch_size=2, steps=2, learning_rate=1e-3, gradient_checkpointing=checkpointing
    )
    for _ in train_steps(model, pairs, SimPOConfig(model="tiny", train=settings), engine):
        pass
    return weights(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("defect", [None, *(defect for defect, _ in DEFECTS)])
def test_training_steps(defect: Defect | None, checkpointing: bool) -> None:
    """Through the fused gradient as often as it should be, or not at all if it is wrong; the
    weights are those that the blocks lead to."""
    model = architecture_with_lora()
    expected = train(model, engine_of(model, "blocks"), checkpointing=checkpointing)
    model = architecture_with_lora()
    with fused_attention_stand_in(defect) as stand_in:
        engine = engine_of(model)
        calls = 0
        for one in PAIRS:  # each is a micro-batch of its own
            fused_calls(model, engine, [one])  # MLX is asked about these lengths
            calls += expected_calls(model, engine, [one], checkpointing=checkpointing)
        stand_in.backward.clear()
        actual = train(model, engine, checkpointing=checkpointing)
        assert len(stand_in.backward) == (0 if defect else 2 * calls)
    assert (AGREES in engine.note) == (defect is None)
    assert greatest_difference(actual, expected) < (1e-3 if defect is None else 1e-6)


def test_a_wrong_gradient_would_change_the_weights() -> None:
    """Of the test above: the planted gradients are wrong enough for it to fail without a check.

    Both responses are long enough for a GPU to fuse them; of a pair, one goes on from the prompt in
    its pass, and the other has fewer queries than keys.
    """
    pairs = [pair(40, 20, 12), pair(35, 30, 60)]
    model = architecture_with_lora()
    expected = train(model, engine_of(model, "blocks"), pairs)
    model = architecture_with_lora()
    with fused_attention_stand_in() as stand_in:
        engine = engine_of(model)
        stand_in.defect = wrong_with_fewer_queries
        actual = train(model, engine, pairs)
    assert greatest_difference(actual, expected) > 1e-2


@pytest.mark.parametrize(
    ("head_sizes", "figures", "reason"),
    [
        ((64,), FUSED, "MLX has no fused gradient for head size 8 in float32"),
        ((8,), GPU, "MLX's fused gradient is not known to be better here"),
        # Measured when the run began, but what was measured is not recorded.
        (
            (8,),
            replace(GPU, source="recorded by the run"),
            "MLX's fused gradient is not known to be better here",
        ),
        (
            (8,),
            replace(GPU, evidence="attention of a layer: MLX's fused 2 ms against blocks 1 ms"),
            "MLX's fused gradient is no better here",
        ),
    ],
)
def test_why_a_gpu_computes_in_blocks(head_sizes: tuple, figures: Any, reason: str) -> None:
    model = architecture_with_lora()
    with fused_attention_stand_in(head_sizes=head_sizes):
        engine = engine_of(model, "auto", figures)
        assert f"; attention: blocks ({reason}){IN_EVALUATION};" in engine.note
        assert fused_calls(model, engine) == 0


def wrong_for_larger_heads(gradients: list, queries: mx.array, *rest: Any) -> list:
    return wrong_keys(gradients) if queries.shape[3] > 8 else gradients


@pytest.mark.parametrize(
    ("head_sizes", "reason"),
    [
        ((8,), "MLX has no fused gradient for head size 24/8 in float32"),
        ((8, 24), "MLX's attention with head size 24 is off by 0.1 of the largest entry in "),
    ],
)
def test_some_layers_may_take_the_blocks(head_sizes: tuple, reason: str) -> None:
    """Those of another head size, for which the gradient is not fused, or wrong."""
    shape = AttentionShape(4, 2, 8, 8, mx.float32, 0.3)
    shapes = [shape, shape._replace(head_size=24)]
    with fused_attention_stand_in(wrong_for_larger_heads, head_sizes=head_sizes):
        choice = choose_attention(shapes, "auto", FUSED)

        def total(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
            return choice.training(AttentionCall(queries, keys, values, 0.3, "causal")).sum()

        for size, calls in ((8, 1), (24, 0)):
            arrays = [mx.ones((1, 2, 12, width)) for width in (size, size, 8)]
            assert primitive_count(MARK, mx.grad(total)(*arrays)) == calls
    start = AGREES.removeprefix("attention: ") + f", blocks for some layers ({reason}"
    assert choice.note.startswith(start)
    assert choice.note.endswith(IN_EVALUATION)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_evaluation_takes_mlxs_forward_for_every_mask(name: str) -> None:
    model = architecture_with_lora(name)
    expected = run(model, engine_of(model, "blocks"), PAIRS)["logps"]
    with fused_attention_stand_in() as stand_in:
        engine = engine_of(model)
        arrays = engine.collate(PAIRS).arrays
        stand_in.forward.clear()
        logps = np.array(engine.logps(model, arrays, training=False))
        assert len(stand_in.forward) == len(model.layers) * (1 + len(arrays[1]))
        has_arrays = any(isinstance(mask, mx.array) for _, _, mask in stand_in.forward)
    assert has_arrays == (name == "mistral")
    np.testing.assert_allclose(logps, expected, atol=1e-5)


def test_a_wrong_forward_is_said_and_the_blocks_evaluate() -> None:
    model = architecture_with_lora("mistral")
    expected = run(model, engine_of(model, "blocks"), PAIRS)["logps"]

    def wrong(value: mx.array, mask: Any) -> mx.array:
        return 2 * value if isinstance(mask, mx.array) else value

    with fused_attention_stand_in(value_defect=wrong):
        engine = engine_of(model)
        logps = engine.logps(model, engine.collate(PAIRS).arrays, training=False)
        np.testing.assert_allclose(logps, expected, atol=1e-6)
    assert f"{AGREES}, blocks for sliding windows, blocks in evaluation (MLX's" in engine.note
    assert "is off by 1 of the largest entry in the value with " in engine.note
    assert "and a sliding window (float32, where 0.002 is rounding)" in engine.note


# --- a setting that cannot be met ----------------------------------------------------------------


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(("defect", "text"), DEFECTS)
def test_mlx_by_setting_is_an_error_where_it_is_wrong(defect: Defect, text: str, gpu: bool) -> None:
    model = architecture_with_lora()
    with fused_attention_stand_in(defect, gpu=gpu), pytest.raises(SimPOError) as caught:
        engine_of(model, "mlx")
    message = str(caught.value)
    assert message.startswith("engine.attention is mlx, but MLX's attention with head size 8 ")
    assert text in message
    assert message.endswith(
        ". Leave it out, or set engine.attention=blocks; please report this together with the "
        "output of `mlx-simpo doctor`"
    )


def test_blocks_by_setting_on_a_gpu() -> None:
    """In evaluation also."""
    model = architecture_with_lora()
    with fused_attention_stand_in() as stand_in:
        engine = engine_of(model, "blocks")
        assert "; attention: blocks, as engine.attention=blocks asks;" in engine.note
        assert fused_calls(model, engine) == 0
        mx.eval(engine.logps(model, engine.collate(PAIRS).arrays, training=False))
        assert stand_in.forward == []


def test_mlx_by_setting_on_a_gpu() -> None:
    """Whatever the figures say, and where the gradient is not fused."""
    model = architecture_with_lora("mistral")
    with fused_attention_stand_in() as stand_in:
        engine = engine_of(model, "mlx", GPU)
        assert "; attention: MLX's operation, as engine.attention=mlx asks;" in engine.note
        stand_in.forward.clear()
        fused_calls(model, engine)
        passes = 1 + len(engine.collate(PAIRS).arrays[1])
        assert len(stand_in.forward) == len(model.layers) * passes


def test_the_stand_in_is_gone_afterwards() -> None:
    with fused_attention_stand_in():
        assert isinstance(mx.fast.scaled_dot_product_attention, FusedAttention)
    assert not isinstance(mx.fast.scaled_dot_product_attention, FusedAttention)
    with on_cpu():
        assert "CPU" in note_of(architecture_with_lora(), "auto", CPU)


# --- which calls are whose ---------------------------------------------------------------------


def call_with(mask: Any = "causal", sinks: mx.array | None = None) -> AttentionCall:
    """Twelve queries of four heads, of the last of 20 positions."""
    keys = mx.random.split(mx.random.key(0), 3)
    queries = mx.random.normal((1, 4, 12, 8), key=keys[0])
    past, values = (mx.random.normal((1, 2, 20, 8), key=key) for key in keys[1:])
    return AttentionCall(queries, past, values, 0.3, mask, sinks)


WINDOW = create_causal_mask(12, 8, window_size=5)


@pytest.mark.parametrize(
    "call",
    [
        call_with(),
        call_with(WINDOW),
        call_with(sinks=mx.array([2.0, -1.0, 0.5, 3.0])),
        call_with(mx.random.normal((1, 4, 12, 20), key=mx.random.key(7))),
        call_with(mx.random.bernoulli(0.7, (1, 4, 12, 20), key=mx.random.key(8))),
    ],
    ids=["causal", "window", "sinks", "additive", "by head"],
)
def test_blocks_compute_every_kind_of_call(call: AttentionCall) -> None:
    actual, expected = attention_in_blocks(CPU.tile_scores)(call), mlx_attention(call)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_call_with_an_array_is_not_fused() -> None:
    """Its gradient would be taken step by step, with all scores in memory."""
    others: list[AttentionCall] = []

    def otherwise(call: AttentionCall) -> mx.array:
        others.append(call)
        return call.queries

    causal, window = call_with(), call_with(WINDOW)
    with fused_attention_stand_in():
        compute = fused_attention(otherwise)
        compute(causal)
        assert others == []
        compute(window)
    assert len(others) == 1
    assert others[0] is window
