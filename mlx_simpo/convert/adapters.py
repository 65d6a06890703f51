"""Adapters from mlx-lm's format to PEFT's and back, each proved by logits."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import SimPOError
from ..files import load_safetensors, read_header, read_json, save_safetensors, write_text
from ..model.adapters import PEFT_WEIGHTS, WEIGHTS, read_adapter_config
from ..model.loading import DTYPES
from ..model.record import RECORD_FILE, RECORD_KEY, base_record, differences_from_training, get_dict
from ..paths import local_path
from ..reporting.display import Display
from ..runs.folder import check_output_free
from ..version import __version__
from .base import Base, architecture
from .mlx_format import read_mlx, write_mlx
from .names import refuse_tied
from .peft.config import read_peft_config
from .peft.read import read_peft
from .peft.write import write_peft
from .staging import staged
from .verify.compare import Comparison, wanted
from .verify.proof import AdapterProof


@dataclass(frozen=True)
class Conversion:
    """What a conversion came to. comparisons: empty if it was not verified."""

    output: Path
    comparisons: list[Comparison] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
        adapter: folder with adapters.safetensors. output: a new folder. model: Hub id or folder of
            its base; default: what the adapter's record says. dtype: of the tensors ("float32",
            "bfloat16", "float16"; default: as they are). separate_experts: see
            `peft_write.write_peft`. verify: compare logits (default: where the model fits).

    Raises:
        SimPOError: an adapter that cannot be read, does not fit the model or that PEFT has no name
            for; a failed verification. Nothing is written then.
    """
    display = display or Display()
    check_arguments(output, dtype)
    config = read_adapter_config(adapter)
    record = get_dict(config, RECORD_KEY)
    base = Base(*base_name(model, revision, config.get("model"), record), trust_remote_code)
    loaded = base.load()
    for difference in differences_from_training(record, loaded):
        display.warn(f"{difference}: the adapter may not fit")
    rule = architecture(loaded)
    updates = read_mlx(adapter, loaded.model)
    bare = base.load()
    refuse_tied(updates, bare.model)
    with staged(output) as folder:
        write_peft(
            folder,
            updates,
            bare.model,
            rule,
            base=base.name,
            revision=loaded.revision,
            separate_experts=separate_experts,
        )
        trained_on = get_dict(record, "base") or base_record(loaded)
        write_record(folder, local_path(adapter), record, trained_on)
        proof = AdapterProof(base, rule, local_path(adapter), folder, display)
        verify = wanted(verify, bare.model, display.note)
        found = proved(proof, folder / PEFT_WEIGHTS, dtype, verify)
    if quantization := loaded.config.get("quantization"):
        display.note(
            f"the base is quantized to {quantization.get('bits')} bits: the adapter is exact on "
            "its dequantized weights (mlx-simpo fuse without --adapter writes them) and not on the "
            "original model's"
        )
    return Conversion(local_path(output), found)


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
        as for `to_peft`; model: default: the adapter's base_model_name_or_path.

    Raises:
        SimPOError: an adapter that cannot be read, is not LoRA, DoRA or rsLoRA, or does not fit
            the model; a failed verification. Nothing is written then.
    """
    display = display or Display()
    check_arguments(output, dtype)
    folder = local_path(adapter)
    content = read_peft_config(folder).content
    named = content.get("base_model_name_or_path")
    base = Base(*base_name(model, revision, named, {}), trust_remote_code)
    loaded = base.load()
    rule = architecture(loaded)
    updates = read_peft(folder, loaded.model, rule)
    refuse_tied(updates, loaded.model)
    extra = {
        "model": base.name,
        RECORD_KEY: {"version": __version__, "base": base_record(loaded), "from": "peft"},
    }
    with staged(output) as written:
        write_mlx(written, updates, loaded.model, extra)
        proof = AdapterProof(base, rule, written, folder, display)
        verify = wanted(verify, loaded.model, display.note)
        found = proved(proof, written / WEIGHTS, dtype, verify)
    return Conversion(local_path(output), found)


def proved(proof: AdapterProof, weights: Path, dtype: str | None, verify: bool) -> list[Comparison]:
    """The comparisons of an adapter that was just written, if it is to be verified; and then its
    tensors in another dtype, if there is to be one: mistakes are told from rounding that way.

    Args:
        weights: the file that was written.
    """
    found = proof.judged() if verify else []
    if dtype is not None:
        tensors = load_safetensors([weights])
        mx.eval(tensors)  # before the file they are read from is written anew
        form = read_header(weights).format
        save_safetensors(weights, {n: t.astype(DTYPES[dtype]) for n, t in tensors.items()}, form)
        found += [proof.rounded()] if verify else []
    return found


def check_arguments(output: str | Path, dtype: str | None) -> None:
    """SimPOError for an output that is taken and a dtype that there is not, before any work."""
    check_output_free(str(output))
    if dtype is not None and dtype not in DTYPES:
        raise SimPOError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")


def base_name(
    model: str | None, revision: str | None, named: Any, record: dict[str, Any]
) -> tuple[str, str | None]:
    """(name, revision) of the base: what the caller says, else what the adapter says."""
    if model is not None:
        return model, revision
    recorded = get_dict(record, "base")
    name = recorded.get("model") or named
    if not isinstance(name, str) or not name:
        raise SimPOError("the adapter does not say which model it belongs to; name it with --model")
    known = recorded.get("revision")
    return name, revision or (known if isinstance(known, str) else None)


def write_record(folder: Path, adapter: Path, record: dict[str, Any], base: dict[str, Any]) -> None:
    """Keep what is known of an adapter's training beside what was made of it.

    Args:
        base: the model that it belongs to, as `model.record.base_record` has it.
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
