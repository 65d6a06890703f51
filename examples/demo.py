"""The demo: SimPO on a real model in two minutes, from example pairs to an adapter.

    make demo        (or: python examples/demo.py [name=value …])

Shows the Python API: load a configuration, train, ask the model before and after.
"""

# First, before anything imports MLX: on a Linux CPU it loads a fast BLAS in place of MLX's own.
from mlx_simpo import SimPOError, blas, generate, load_config, train

# isort: split
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from smollm2 import smollm2

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Tell me something nice about rain."
MAX_TOKENS = 120
DEMO_OUTPUT = "runs/demo"


def main() -> None:
    """Train on the example pairs and print one response before and after.

    Raises:
        SimPOError: a setting on the command line is wrong.
    """
    console = Console(highlight=False)
    console.print("[bold]1. The model[/bold]: SmolLM2-135M-Instruct, from its PyPI wheel")
    model = smollm2("float32")
    console.print(f"   {model}\n")

    console.print("[bold]2. Training[/bold] with SimPO: brief responses are preferred to rambling")
    console.print("   settings: configs/demo.yaml, pairs: examples/train.jsonl")
    settings = [f"model={model}", *sys.argv[1:]]
    config = load_config(ROOT / "configs" / "demo.yaml", settings)
    if config.output == DEMO_OUTPUT:
        shutil.rmtree(config.output, ignore_errors=True)  # of an earlier demo
    result = train(config)
    if result.interrupted:
        sys.exit(result.exit_status)

    console.print(f"\n[bold]3. One question[/bold], before and after: {QUESTION}")
    responses = generate(config, QUESTION, result.adapter, max_tokens=MAX_TOKENS)
    for name, title, style in (("base", "before", "red"), ("adapter", "after", "green")):
        title = f"{title} (at most {MAX_TOKENS} tokens)"
        console.print(Panel(Text(responses[name]), title=title, title_align="left", style=style))

    console.print(f"[bold]The adapter[/bold] is in {result.adapter}. Ask it yourself:\n")
    programs = Path(sys.executable).parent
    # mlx_lm's own commands do not import mlx_simpo, and so get OpenBLAS by LD_PRELOAD.
    fast = f"env $({programs}/python -m mlx_simpo.blas) " if blas.library() else ""
    prompt = shlex.quote("How does a rainbow form?")
    console.print(
        f"  {fast}{programs}/mlx_lm.generate --model {model} \\\n"
        f"    --adapter-path {result.adapter} --prompt {prompt}\n",
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        main()
    except SimPOError as error:
        sys.exit(f"demo: {error}")
