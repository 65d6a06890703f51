"""Training steps of models with the gated delta rule: seconds, steps per second and peak memory.

    python benchmarks/delta_rule.py --tokenizer FOLDER --data train.jsonl

A tiny and a mid-sized random Qwen 3.5 (three layers of four compute the gated delta rule) on real
pairs of 4 a step, and their gradients, four ways:

- ours: the shared-prefix engine as it is chosen here
- ours, mlx-lm's loop: the same, but the rule as mlx-lm trains it, one token after the other
- reference: the reference engine, not compiled
- mlx-lm, stacked: mlx-lm's model, log-softmax and gather in float32, without any code of ours

All take turns in one process, batch by batch, in an order that moves on; a first step of each is
not counted. Ratios are of the sums over the batches, of time that has passed and of the processor's (which tells
more on a machine that others use). Then the rule alone, with its gradient, in
chunks of several sizes. What is written: benchmarks/results/delta_rule_<name>.json.
"""

# First, before anything imports MLX: on a Linux CPU it loads a fast BLAS in place of MLX's own.
from mlx_simpo import LoRAConfig, ObjectiveConfig, TrainConfig
from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.engine import delta_rule, operation_choice
from mlx_simpo.engine.choice import REFERENCE, Engine, shared_prefix_engine
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.training.step import GradientFunction, collate_step, step_gradients

# isort: split
import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.gated_delta import gated_delta_ops
from mlx_lm.utils import _get_classes
from provenance import provenance, write_result
from shapes import SHAPES, Batches, response_lengths, tokenized

OBJECTIVE = ObjectiveConfig()
BASELINE = "mlx-lm, stacked"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024,  # with a real vocabulary, the head would be most of the step
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "mid": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
}
CHUNK_SIZES = (16, 32, 64, 128)

# (model, pairs) → the loss, and the gradient of the LoRA layers.
Step = Callable[[nn.Module, Sequence[EncodedPair]], tuple[float, dict]]


def random_model(size: str, vocabulary: int) -> nn.Module:
    config = {
        "model_type": "qwen3_5",
        "vocab_size": vocabulary,  # of the tokenizer, if the size has none of its own
        "tie_word_embeddings": True,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        **SIZES[size],
    }
    mx.random.seed(0)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict({"text_config": config, **config}))
    mx.eval(model.parameters())
    attach_lora(model, LoRAConfig(rank=16), seed=0)
    model.train()
    return model


def engine_step(engine: Engine, model: nn.Module) -> Step:
    gradients_of = GradientFunction(model, asdict(OBJECTIVE), engine, compiled=False)

    def step(model: nn.Module, pairs: Sequence[EncodedPair]) -> tuple[float, dict]:
        options = TrainConfig(engine=engine.name, batch_size=len(pairs))  # type: ignore[arg-type]
        batch = collate_step(pairs, engine, options)
        parts, gradients = step_gradients(gradients_of, batch)
        mx.eval(parts, gradients)
        return float(np.concatenate([np.array(p["loss"]) for p in parts]).mean()), gradients

    return step


def plain_step(model: nn.Module, pairs: Sequence[EncodedPair]) -> tuple[float, dict]:
    """The step as one writes it first: all sequences in one padded array, all logits."""
    sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    longest = max(len(s.tokens) for s in sequences)
    tokens = np.zeros((len(sequences), longest), np.int32)
    scored = np.zeros((len(sequences), longest - 1), np.float32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence.tokens)] = sequence.tokens
        scored[row, sequence.score_start - 1 : len(sequence.tokens) - 1] = 1
    inputs, mask = mx.array(tokens), mx.array(scored)

    def loss(model: Any) -> mx.array:
        logits = model(inputs[:, :-1]).astype(mx.float32)
        logps = -nn.losses.cross_entropy(logits, inputs[:, 1:])
        average = (logps * mask).sum(-1) / mask.sum(-1)
        chosen, rejected = mx.split(average, 2)
        z = OBJECTIVE.beta * (chosen - rejected - OBJECTIVE.gamma_beta_ratio)
        return -nn.log_sigmoid(z).mean()

    value, gradients = nn.value_and_grad(model, loss)(model)
    mx.eval(value, gradients)
    return float(value), gradients


def ways(model: nn.Module) -> dict[str, tuple[str, Step]]:
    """Name → (note, step)."""
    ours = shared_prefix_engine(model)
    chosen = operation_choice.choose_delta_rule
    operation_choice.choose_delta_rule = lambda model: (None, "delta rule: mlx-lm's loop")
    looping = shared_prefix_engine(model)
    operation_choice.choose_delta_rule = chosen
    return {
        "ours": (ours.note, engine_step(ours, model)),
        "ours, mlx-lm's loop": (looping.note, engine_step(looping, model)),
        "reference": (REFERENCE.note, engine_step(REFERENCE, model)),
        BASELINE: ("one stacked forward pass, all logits", plain_step),
    }


def measure(size: str, vocabulary: int, batches: Batches, repeats: int) -> dict:
    model = random_model(size, vocabulary)
    steps = ways(model)
    names, runs = list(steps), []
    expected: dict[int, tuple[float, dict]] = {}
    for number, tokens in enumerate(batches):
        batch = encoded(tokens, SIZES[size].get("vocab_size", vocabulary))
        for repeat in range(1 if number else 0, repeats + 1):
            first = (number + repeat) % len(names)
            for name in names[first:] + names[:first]:
                mx.clear_cache()
                mx.reset_peak_memory()
                started, processor = time.perf_counter(), time.process_time()
                loss, gradients = steps[name][1](model, batch)
                seconds = time.perf_counter() - started
                processor = time.process_time() - processor
                arrays = {k: np.array(g) for k, g in tree_flatten(gradients)}
                exact_loss, exact = expected.setdefault(number, (loss, arrays))
                largest = max(float(np.abs(g).max()) for g in exact.values())
                off = max(float(np.abs(arrays[k] - g).max()) for k, g in exact.items()) / largest
                run = {
                    "way": name,
                    "batch": number,
                    "repeat": repeat,
                    "seconds": seconds,
                    "processor_seconds": processor,
                    "peak_gb": mx.get_peak_memory() / 1e9,
                    "loss_difference": abs(loss - exact_loss),
                    "gradient_difference": off,
                }
                print(f"  {size} {number} {name:20} {seconds:7.2f} s", file=sys.stderr, flush=True)
                runs += [run] if repeat else []
    return {"ways": summary(runs, steps, len(batches)), "runs": runs}


def summary(runs: list[dict], steps: dict[str, tuple[str, Step]], batches: int) -> list[dict]:
    lines = []
    for name, (note, _) in steps.items():
        own = [run for run in runs if run["way"] == name]
        seconds, processor = (
            sum(statistics.median(r[clock] for r in own if r["batch"] == i) for i in range(batches))
            for clock in ("seconds", "processor_seconds")
        )
        line = {"way": name, "note": note, "steps_per_second": batches / seconds}
        line["processor_seconds"] = processor
        for key in ("peak_gb", "loss_difference", "gradient_difference"):
            line[key] = max(r[key] for r in own)
        lines.append(line)
    base = next(line for line in lines if line["way"] == BASELINE)
    for line in lines:
        line["speed_ratio"] = line["steps_per_second"] / base["steps_per_second"]
        line["processor_ratio"] = base["processor_seconds"] / line["processor_seconds"]
        line["memory_ratio"] = line["peak_gb"] / base["peak_gb"]
    return lines


def chunk_sizes(size: str, tokens: int, rows: int, repeats: int) -> list[dict]:
    """The rule alone, with its gradient: seconds and peak memory by size of the chunks."""
    config = SIZES[size]
    heads, dk = config["linear_num_value_heads"], config["linear_key_head_dim"]
    keys = (rows, tokens, config["linear_num_key_heads"], dk)
    normal, uniform = mx.random.normal, mx.random.uniform
    inputs = [normal(keys) / dk, normal(keys) / dk**0.5, normal((rows, tokens, heads, dk))]
    inputs += [uniform(0.5, 1, (rows, tokens, heads)), uniform(0, 1, (rows, tokens, heads))]
    inputs += [normal((rows, heads, dk, dk))]
    cotangents = [mx.ones_like(inputs[2]), mx.ones_like(inputs[5])]
    mx.eval(inputs, cotangents)
    default, best = delta_rule.CHUNK, {}
    for _ in range(repeats + 1):
        for chunk in (*CHUNK_SIZES, None):
            delta_rule.CHUNK = chunk or default
            rule = delta_rule.chunked_delta_rule if chunk else gated_delta_ops
            mx.clear_cache()
            mx.reset_peak_memory()
            started = time.perf_counter()
            mx.eval(mx.vjp(rule, inputs, cotangents))
            seconds = time.perf_counter() - started
            before = best.get(chunk, (np.inf, 0))[0]
            best[chunk] = (min(before, seconds), mx.get_peak_memory() / 1e9)
    delta_rule.CHUNK = default
    return [
        {"chunk": chunk or "mlx-lm's loop", "seconds": seconds, "peak_gb": peak}
        for chunk, (seconds, peak) in best.items()
    ]


def encoded(batch: list[dict], vocabulary: int) -> list[EncodedPair]:
    def sequence(pair: dict, side: str) -> TokenizedSequence:
        return TokenizedSequence(np.array(pair[side], np.int32) % vocabulary, pair["start"])

    return [EncodedPair(sequence(p, "chosen"), sequence(p, "rejected")) for p in batch]


def show(lines: list[dict], columns: dict[str, str]) -> None:
    """A table: name → format of each column."""
    print("| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", sep="\n")
    for line in lines:
        print("| " + " | ".join(f"{line[name]:{form}}" for name, form in columns.items()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of a model, for its tokenizer")
    parser.add_argument("--data", required=True, help="pairs, .jsonl")
    parser.add_argument("--shape", default="natural", choices=SHAPES)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batches", type=int, default=3, help="steps of 4 pairs")
    parser.add_argument("--repeats", type=int, default=1, help="counted runs of each batch")
    parser.add_argument("--name", default="all", help="the result's: results/delta_rule_NAME.json")
    options = parser.parse_args()
    paths = (options.tokenizer, options.data)
    shown = [Path(a).name if a in paths else a for a in sys.argv[1:]]
    record: dict[str, Any] = {
        "provenance": provenance(" ".join(["python benchmarks/delta_rule.py", *shown])),
        "sizes": {},
    }
    pairs = tokenized(options.tokenizer, options.data)
    vocabulary = 1 + max(max(*p["chosen"], *p["rejected"]) for p in pairs)
    batches = SHAPES[options.shape](pairs, options.batches)
    record["batches"] = [[(p["start"], *response_lengths(p)) for p in batch] for batch in batches]
    for size in options.sizes:
        record["sizes"][size] = measure(size, vocabulary, batches, options.repeats)
        record["sizes"][size]["chunks"] = chunk_sizes(size, 400, 4, options.repeats)
        write_result(f"delta_rule_{options.name}", record)
    for size, result in record["sizes"].items():
        print(f"\n{size}")
        columns = {"way": "", "steps_per_second": ".3f", "speed_ratio": ".2f"}
        columns |= {
            "processor_ratio": ".2f",
            "peak_gb": ".2f",
            "memory_ratio": ".2f",
            "loss_difference": ".1e",
            "gradient_difference": ".1e",
        }
        show(result["ways"], columns)
        show(result["chunks"], {"chunk": "", "seconds": ".3f", "peak_gb": ".3f"})


if __name__ == "__main__":
    main()
