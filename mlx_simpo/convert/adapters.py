"""Adapters from mlx-lm's format to PEFT's and back, each conversion verified by logits."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import SimPOError
from ..files import load_safetensors, read_header, read_json, save_safetensors, write_text
from ..model.adapters import PEFT_WEIGHTS, WEIGHTS, read_adapter_config
from ..model.loading import DTYPES
from ..model.record import RECORD_FILE, RECORD_KEY, base_record, get_dict
from ..paths import local_path
from ..reporting.advice import adapter_mismatch
from ..reporting.display import Display
from ..runs.folder import check_output_free
from ..version import __version__
from .base import Base, architecture_of
from .mlx_format import read_mlx, write_mlx
from .names import check_not_tied
from .peft.config import read_peft_config
from .peft.read import read_peft
from .peft.write import write_peft
from .staging import staged
from .verify.compare import Comparison, should_verify
from .verify.proof import AdapterProof


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    output: the folder that was written. comparisons: [] if it was not verified.
    """

    output: Path
    comparisons: list[Comparison] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        checks = [{**c._asdict(), "passed": c.passed} for c in self.comparisons]
        return {"output": str(self.output), "comparisons": checks}


def to_peft(
    adapter: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    separate_experts: bool = False,
    verify: bool | None = None,
    trust_remote_code: bool = False,
    display: Display | None = None,
) -> Conversion:
    """Write an mlx-lm adapter as a PEFT adapter.

    Args:
        adapter: folder with adapters.safetensors.
        model: None for the one that the adapter's record names.
        separate_experts: see `peft.write.write_peft`.

    The other arguments: see `mlx_simpo.convert`.

    Raises:
        SimPOError: the adapter cannot be read, does not fit the model or has no counterpart in
            PEFT, or the verification failed. Nothing is written then.
    """
    display = display or Display()
    check_arguments(output, dtype)
    config = read_adapter_config(adapter)
    record = get_dict(config, RECORD_KEY)
    base = Base(*base_name(model, revision, config.get("model"), record), trust_remote_code)
    adapted = base.load()
    display.warn(adapter_mismatch(record, adapted))
    rule = architecture_of(adapted)
    deltas = read_mlx(adapter, adapted.model)  # attaches the adapter: the base is loaded again
    base_model = base.load().model
    check_not_tied(deltas, base_model)
    with staged(output) as folder:
        write_peft(
            folder,
            deltas,
            base_model,
            rule,
            base=base.name,
            revision=adapted.revision,
            separate_experts=separate_experts,
        )
        trained_on = get_dict(record, "base") or base_record(adapted)
        write_record(folder, local_path(adapter), record, trained_on)
        proof = AdapterProof(base, rule, local_path(adapter), folder, display)
        verify = should_verify(verify, base_model, display.note)
        comparisons = verify_and_cast(proof, folder / PEFT_WEIGHTS, dtype, verify)
    if quantization := adapted.config.get("quantization"):
        display.note(
            f"the base model is quantized to {quantization.get('bits')} bits: the adapter is exact "
            "on its dequantized weights (mlx-simpo fuse without --adapter writes them), not on "
            "those of the original model"
        )
    return Conversion(local_path(output), comparisons)


def from_peft(
    adapter: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    verify: bool | None = None,
    trust_remote_code: bool = False,
    display: Display | None = None,
) -> Conversion:
    """Write a PEFT LoRA adapter as an mlx-lm adapter.

    Args:
        adapter: folder with adapter_model.safetensors.
        model: None for the adapter's base_model_name_or_path.

    The other arguments: see `mlx_simpo.convert`.

    Raises:
        SimPOError: the adapter cannot be read, is not LoRA, DoRA or rsLoRA, or does not fit the
            model, or the verification failed. Nothing is written then.
    """
    display = display or Display()
    check_arguments(output, dtype)
    folder = local_path(adapter)
    name = read_peft_config(folder).content.get("base_model_name_or_path")
    base = Base(*base_name(model, revision, name, {}), trust_remote_code)
    loaded = base.load()
    rule = architecture_of(loaded)
    deltas = read_peft(folder, loaded.model, rule)
    check_not_tied(deltas, loaded.model)
    extra = {
        "model": base.name,
        RECORD_KEY: {"version": __version__, "base": base_record(loaded), "from": "peft"},
    }
    with staged(output) as written:
        write_mlx(written, deltas, loaded.model, extra)
        proof = AdapterProof(base, rule, written, folder, display)
        verify = should_verify(verify, loaded.model, display.note)
        comparisons = verify_and_cast(proof, written / WEIGHTS, dtype, verify)
    return Conversion(local_path(output), comparisons)


def verify_and_cast(
    proof: AdapterProof, weights: Path, dtype: str | None, verify: bool
) -> list[Comparison]:
    """Verify an adapter that was just written, then cast its tensors to another dtype if asked for.

    In this order, so that rounding does not hide mistakes; the effect of rounding is only shown.

    Args:
        weights: the file that was written.

    Raises:
        SimPOError: the verification failed.
    """
    comparisons = proof.verify() if verify else []
    if dtype is not None:
        tensors = load_safetensors([weights])
        mx.eval(tensors)  # before the file that they are read from is overwritten
        form = read_header(weights).format
        save_safetensors(weights, {n: t.astype(DTYPES[dtype]) for n, t in tensors.items()}, form)
        comparisons += [proof.compare_rounded()] if verify else []
    return comparisons


def check_arguments(output: str | Path, dtype: str | None) -> None:
    """Check a conversion's arguments before it does any work.

    Raises:
        SimPOError: the output folder is not empty, or the dtype is unknown.
    """
    check_output_free(str(output))
    if dtype is not None and dtype not in DTYPES:
        raise SimPOError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")


def base_name(
    model: str | None, revision: str | None, named: Any, record: dict[str, Any]
) -> tuple[str, str | None]:
    """Return name and revision of the base model: the caller's, or else the adapter's.

    Args:
        model, revision: the caller's.
        named: the model in the adapter's configuration, of any type.
        record: of the adapter's training, {} if there is none.

    Raises:
        SimPOError: neither says which model it is.
    """
    if model is not None:
        return model, revision
    recorded = get_dict(record, "base")
    name = recorded.get("model") or named
    if not isinstance(name, str) or not name:
        raise SimPOError("the adapter does not say which model it belongs to; name it with --model")
    known = recorded.get("revision")
    return name, revision or (known if isinstance(known, str) else None)


def write_record(folder: Path, adapter: Path, record: dict[str, Any], base: dict[str, Any]) -> None:
    """Write the record of an adapter's training into the folder that it was converted to.

    Args:
        folder: of the conversion's output.
        adapter: folder of the adapter, for its summary.json.
        record: of the adapter's training, {} if there is none.
        base: the model that the output belongs to, as `model.record.base_record` describes it.
    """
    summary = adapter / "summary.json"
    content = {
        "version": record.get("version", __version__),
        "base": base,
        "template_sha256": record.get("template_sha256"),
        "training": {
            "config": record.get("config"),
            "summary": read_json(summary) if summary.is_file() else None,
        },
    }
    write_text(folder / RECORD_FILE, json.dumps(content, indent=2) + "\n")
