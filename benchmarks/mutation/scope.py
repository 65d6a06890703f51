"""Which modules are changed, and which tests must notice."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "mlx_simpo"
SCOPE = (
    "objectives.py",
    "engine/*.py",
    "kernels/*.py",
    "training/*.py",
    "evaluation.py",
    "data/encode.py",
    "data/special_tokens.py",
    "data/truncation.py",
    "data/records.py",
    "data/order.py",
    "data/keys.py",
    "model/lora.py",
    "model/adapters.py",
    "convert/peft/*.py",
)
# Of a module without a test module of its own, and where a neighbour's tests are meant for it too.
TESTS: dict[str, tuple[str, ...]] = {
    # The kernel's text (metal_mutants.py), whose suffixes are .metal and .h.
    "kernels/cuda.py": ("kernels/test_launch.py",),
    "kernels/response_logps.py": ("kernels/test_launch.py",),
    "engine/agreement.py": ("engine/test_choice.py", "engine/test_fused_attention.py"),
    "data/encode.py": ("data/test_official.py", "data/test_scored_text.py"),
    "data/truncation.py": ("data/test_encode.py",),
    "training/trainer.py": ("training/test_state.py",),
    "engine/stopwatch.py": ("engine/test_head_timing.py",),
}


def modules(names: list[str]) -> list[Path]:
    """Return the modules with those names (``engine/head``), or all in scope.

    Raises:
        SystemExit: no module in scope has that name.
    """
    every = [path for pattern in SCOPE for path in sorted((ROOT / PACKAGE).glob(pattern))]
    every = [path for path in every if path.name != "__init__.py"]
    if not names:
        return every
    chosen = [path for path in every if any(_is_called(path, name) for name in names)]
    for name in names:
        if not any(_is_called(path, name) for path in chosen):
            raise SystemExit(
                f"{name} is not among the modules that are changed: {short(every[0])} …"
            )
    return chosen


def _is_called(path: Path, name: str) -> bool:
    """``engine`` names all modules of that room."""
    return f"{short(path)}/".startswith(f"{name.removesuffix('.py')}/")


def short(module: Path | str) -> str:
    """Return ``engine/head`` for mlx_simpo/engine/head.py."""
    path = Path(module)
    path = path.relative_to(ROOT) if path.is_absolute() else path
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def tests_of(module: Path | str) -> list[str]:
    """Return the test modules that must notice a mistake in a module, the nearest first."""
    name = f"{short(module)}.py"
    mirrored = Path(name).with_name(f"test_{Path(name).name}").as_posix()
    files = [mirrored, *TESTS.get(name, ())]
    return [f"tests/{file}" for file in files if (ROOT / "tests" / file).exists()]
