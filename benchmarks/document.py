"""Writes the tables and plots of docs/benchmarks.md and docs/kernel.md from results/.

    python benchmarks/document.py      # needs matplotlib

Whatever is between <!-- NAME --> and <!-- /NAME --> is replaced.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "mlx_simpo"  # the same file for the same numbers
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / name for name in ("benchmarks.md", "kernel.md")]
IMAGES = ROOT / "docs" / "img"
RESULTS = ROOT / "benchmarks" / "results"
QUICKEST = ("natural", "long_prompts", "short_balanced")  # comparisons of the quickest libraries
COLOURS = {"mlx_simpo": "#c2410c", "stacked, compiled": "#334155"}
SHAPE_NAMES = {
    "natural": "data as they are",
    "long_prompts": "long prompts, short responses",
    "short_prompts": "short prompts, long responses",
    "balanced": "balanced",
    "very_long": "one pair of 2048 tokens",
}


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def step_table(shape: dict[str, Any]) -> str:
    """Return one shape of a step_*.json as a Markdown table."""
    lines = [
        "| | pairs/s, of stacked | s per pair | real tokens/s | positions | head rows "
        "| peak GB | of stacked | process GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(shape["libraries"], key=lambda r: r["seconds_per_pair"]):
        memory = f"{r['peak_gb']:.2f} | {r['memory_ratio']:.2f}" if r["peak_gb"] else "– | –"
        lines.append(
            f"| {r['library']} | {r['speed_ratio']:.2f} | {r['seconds_per_pair']:.2f} | "
            f"{r['real_tokens_per_second']:.0f} | {r['positions']} | {r['logit_rows']} | "
            f"{memory} | {r['process_gb']:.2f} |"
        )
    for name, error in shape["errors"].items():
        lines.append(f"\n{name} did not run: {error}")
    return "\n".join(lines)


def steps() -> dict[str, str]:
    blocks = {}
    for name in (*QUICKEST, "all"):
        record = load(f"step_{name}")
        if record is None:
            continue
        parts = []
        for name_of_shape, shape in record["shapes"].items():
            pairs = sum(map(len, shape["batches"]))
            ours = next(r for r in shape["libraries"] if r["library"] == "mlx_simpo")
            parts.append(
                f"**{SHAPE_NAMES[name_of_shape]}** ({pairs} pairs; the machine's matrix products: "
                f"{shape['matmul_gflops']:.0f} GFLOP/s, of which our step uses "
                f"{100 * ours['share_of_matmul_rate']:.0f} %)\n\n{step_table(shape)}"
            )
        blocks[f"step_{name}"] = "\n\n".join(parts)
    return blocks


def plot_steps() -> None:
    """Speed of the quickest libraries, shape by shape."""
    records = filter(None, (load(f"step_{name}") for name in QUICKEST))
    shapes = {name: shape for record in records for name, shape in record["shapes"].items()}
    figure, axes = plt.subplots(1, len(shapes), figsize=(2.7 * len(shapes), 2.2), sharey=True)
    for axis, (name_of_shape, shape) in zip(axes, shapes.items(), strict=True):
        ratio = {r["library"]: r["speed_ratio"] for r in shape["libraries"]}
        names = sorted(ratio, key=lambda name: ("mlx_simpo" not in name, name))
        colours = ["#c2410c" if name == "mlx_simpo" else "#94a3b8" for name in names]
        axis.barh(names, [ratio[name] for name in names], color=colours)
        for position, name in enumerate(names):
            axis.text(ratio[name], position, f" {ratio[name]:.2f}", va="center", fontsize=8)
        axis.set_title(SHAPE_NAMES[name_of_shape], fontsize=9)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, max(ratio.values()) * 1.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.supxlabel("pairs per second, relative to the compiled stacked step", fontsize=9)
    figure.tight_layout()
    figure.savefig(IMAGES / "step.svg", metadata={"Date": None})


def memory() -> dict[str, str]:
    """The table of memory.json, and its plot."""
    record = load("memory")
    if record is None:
        return {}
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    lengths = sorted({int(n) for library in record["lengths"].values() for n in library})
    lines = [
        "| tokens | " + " | ".join(record["lengths"]) + " |",
        "|---|" + "---|" * len(record["lengths"]),
    ]
    for style, (name, by_length) in zip(
        itertools.cycle(("-", "--", "-.", ":")), record["lengths"].items(), strict=False
    ):
        axis.plot(
            [int(n) for n in by_length],
            [r.get("peak_gb") for r in by_length.values()],
            marker="o",
            linestyle=style,
            color=COLOURS.get(name, "#94a3b8"),
            label=name,
        )
    for n in lengths:
        cells = [library.get(str(n), {}).get("peak_gb") for library in record["lengths"].values()]
        lines.append(f"| {n} | " + " | ".join(f"{c:.2f} GB" if c else "–" for c in cells) + " |")
    axis.set_xlabel("tokens of each of the two sequences")
    axis.set_ylabel("peak memory, GB")
    axis.set_ylim(0)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(IMAGES / "memory.svg", metadata={"Date": None})
    return {"memory": "\n".join(lines)}


def overhead() -> dict[str, str]:
    record = load("overhead")
    if record is None:
        return {}
    runs = [
        f"| {r['batch_size']} × {r['accumulation']} | {r['seconds'] / r['steps']:.1f} | "
        f"{100 * r['outside']:.2f} % | {100 * r['idle']:.2f} % |"
        for r in record["runs"]
    ]
    epochs = [
        f"| {e['step_pairs']} | {100 * e['padding_share_trunk_and_head']:.1f} % | "
        f"{100 * e['padding_share']:.1f} % | {100 * e['prompt_twice_share']:.1f} % | "
        f"{100 * e['padding_share_stacked']:.0f} % | {e['positions_ratio']:.2f} |"
        for e in record["epoch"]
    ]
    return {
        "overhead": "\n".join(
            ["| batch × accumulation | s per step | outside | idle |", "|---|---|---|---|", *runs]
        ),
        "padding": "\n".join(
            [
                "| pairs per step | padding, trunk and head | padding, trunk | prompt tokens run "
                "twice | padding, stacked | positions, stacked / ours |",
                "|---|---|---|---|---|---|",
                *epochs,
            ]
        ),
    }


def head() -> dict[str, str]:
    record = load("head")
    if record is None:
        return {}
    lines = [
        "| rows | vocabulary | ours | all logits at once | mx.fast.cross_entropy |",
        "|---|---|---|---|---|",
    ]
    for m in record["memory"]:
        cells = [f"{m[way]:.2f} GB" for way in ("ours", "whole", "fused")]
        lines.append(f"| {m['rows']} | {m['vocabulary']} | " + " | ".join(cells) + " |")
    return {"head": "\n".join(lines)}


def primitives() -> dict[str, str]:
    record = load("primitives")
    if record is None:
        return {}
    before, after = record["per_pair"]["before"], record["per_pair"]["after"]

    def change(name: str, key: str, scale: float = 1.0) -> str:
        one, two = (scale * version[name][key] for version in (before, after))
        return f"{one:,.0f} → {two:,.0f}"

    counts = [
        "| graph, dtype | passes | primitives | that launch a kernel | | kernels | ms of Python |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in before:
        passes = f"{before[name]['passes']:.2f} → {after[name]['passes']:.2f}"
        saved = 1 - after[name]["launching"] / before[name]["launching"]
        counts.append(
            f"| {name} | {passes} | {change(name, 'primitives')} | {change(name, 'launching')} | "
            f"−{100 * saved:.0f} % | {change(name, 'kernels')} | {change(name, 'seconds', 1e3)} |"
        )
    computed = record["computed_not_measured"]
    variant = "gpu, mx.fast, bfloat16"
    bounds = [computed["bounds"][version][variant] for version in ("before", "after")]
    limits = [
        "| | starting kernels, ms | reading weights, ms | products, ms |",
        "|---|---|---|---|",
    ]
    for chip in computed["chips"]:
        starts = ["–".join(f"{1e3 * s:.0f}" for s in b[chip]["start_s"]) for b in bounds]
        weights = [f"{1e3 * b[chip]['weights_s']:.1f}" for b in bounds]
        limits.append(
            f"| {chip} | {' → '.join(starts)} | {' → '.join(weights)} | "
            f"{1e3 * bounds[1][chip]['products_s']:.0f} |"
        )
    return {"primitives": "\n".join(counts), "primitives_computed": "\n".join(limits)}


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    blocks = {**steps(), **memory(), **overhead(), **head(), **primitives()}
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for name, text in blocks.items():
            block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
            page = re.sub(
                rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, page, flags=re.S
            )
        path.write_text(page, encoding="utf-8")
    plot_steps()


if __name__ == "__main__":
    main()
