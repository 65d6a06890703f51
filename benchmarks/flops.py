"""What a step cannot do without, and what the machine could do: for "how far from the limit"."""

import json
import subprocess
import sys

RATE = """
import json, time, mlx.core as mx
a, b = mx.random.normal((1024, 576)), mx.random.normal((1536, 576))
mx.eval(a, b)
best = 0.0
for _ in range(12):
    started = time.perf_counter()
    mx.eval([a @ b.T for _ in range(10)])
    best = max(best, 20 * a.size * 1536 / (time.perf_counter() - started))
print(json.dumps(best))
"""


def matmul_rate() -> float:
    """FLOP/s of float32 products [1024, 576] · [576, 1536], the best of some, in a new process."""
    out = subprocess.run([sys.executable, "-c", RATE], capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def needed_flops(batch: list[dict], config: dict, rank: int) -> float:
    """Matrix products of forward and backward pass with nothing done twice: the prompt once, no
    padding, scored rows through the head, no gradient of frozen weights.

    Of a llama with LoRA on all linear layers. Forward 2 per weight and position, backward 2 (to the
    input; frozen weights get none), 4 for LoRA's own; attention 4 and 8 per query, key and channel;
    the head twice 2 per weight and scored row.
    """
    d, f = config["hidden_size"], config["intermediate_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or d // heads
    linear = [(d, heads * width), (d, kv * width), (d, kv * width), (heads * width, d)]
    linear += [(d, f), (d, f), (f, d)]
    weights = sum(i * o for i, o in linear)
    lora = sum(rank * (i + o) for i, o in linear)
    total = 0.0
    for pair in batch:
        prefix = pair["start"] - 1
        rows = [len(pair[name]) - 1 - prefix for name in ("chosen", "rejected")]
        keys = prefix * (prefix + 1) / 2 + sum(n * prefix + n * (n + 1) / 2 for n in rows)
        block = (prefix + sum(rows)) * (4 * weights + 6 * lora) + keys * 12 * heads * width
        total += block * config["num_hidden_layers"] + sum(rows) * 4 * d * config["vocab_size"]
    return total
