"""A folder that others can use: of which kind it is, and what it says about its training."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.yaml import parse_yaml
from ..errors import SimPOError
from ..files import MODEL_WEIGHTS, read_header, read_json
from ..model.adapters import CONFIG, PEFT_WEIGHTS, WEIGHTS
from ..model.record import RECORD, RECORD_FILE, table
from ..paths import local_path

MODEL_CONFIG = "config.json"
# Absolute, of a home, or relative to where somebody stood; with a drive or a share on Windows.
_LOCAL_FORM = re.compile(r"^(?:/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
_DATA_FILE = re.compile(r"\.(?:jsonl|jsonl\.gz|json|parquet)$")


class Kind(NamedTuple):
    """A kind of folder. name: for programs. what: for people. library, relation, tags: the Hub's
    library_name, base_model_relation and tags. weights: pattern of the weights' names."""

    name: str
    what: str
    library: str
    relation: str
    tags: tuple[str, ...]
    weights: str


RUN = Kind("run", "LoRA adapter for mlx-lm", "mlx", "adapter", ("lora", "mlx"), WEIGHTS)
PEFT = Kind("peft", "LoRA adapter for PEFT", "peft", "adapter", ("lora", "peft"), PEFT_WEIGHTS)
HF = Kind("transformers", "model", "transformers", "finetune", (), MODEL_WEIGHTS)
MLX = Kind("mlx", "model for mlx-lm", "mlx", "finetune", ("mlx",), MODEL_WEIGHTS)
BY_FORMAT = {"pt": HF, "mlx": MLX}


@dataclass(frozen=True)
class Folder:
    """An opened folder.

    config: adapter_config.json or config.json. base, revision: the base model as the trainer named
    it. record: of the training, in mlx_simpo.json or adapter_config.json. settings: the run's, as
    nested mappings. summary: what the run came to. All but path, kind and config may be missing:
    None, or empty.
    """

    path: Path
    kind: Kind
    config: dict[str, Any]
    record: dict[str, Any]
    settings: Any
    summary: Any

    @property
    def base(self) -> str | None:
        """The base model; for PEFT the one that its own configuration names."""
        named = self.config.get("base_model_name_or_path") if self.kind is PEFT else None
        return text_or_none(named) or self.trained_on

    @property
    def trained_on(self) -> str | None:
        """The model that was trained on, which may be a quantized form of `base`."""
        candidates = [at(self.record, "base.model"), at(self.settings, "model")]
        candidates += [self.config.get("model")] if self.kind is RUN else []
        return next((name for name in map(text_or_none, candidates) if name), None)

    @property
    def revision(self) -> str | None:
        """The revision of `base`, if the record gives one."""
        known = at(self.record, "base.revision") or at(self.settings, "revision")
        return text_or_none(known) if self.base == self.trained_on else None

    def public(self, name: Any) -> "Public | None":
        """`public_name` of what the record gives as a name, which may be nothing."""
        found = text_or_none(name)
        return None if found is None else public_name(found, self.path)


def text_or_none(value: Any) -> str | None:
    """``value`` if it is text with something in it."""
    return value if isinstance(value, str) and value.strip() else None


def at(values: Any, place: str) -> Any:
    """The value at a dotted place in nested mappings; None where any part of it is missing."""
    for name in place.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def open_folder(name: str | Path) -> Folder:
    """The folder of this name, its kind and its record.

    Raises:
        SimPOError: no such folder, neither an adapter nor a model in it (or both), or files that
            cannot be read.
    """
    path = local_path(name)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise SimPOError(f"{str(name)!r} {what}; name the folder of an adapter or a model")
    kind = kind_of(path)
    config = read_json(path / (CONFIG if kind.relation == "adapter" else MODEL_CONFIG))
    if kind is RUN:
        settings = path / "config.yaml"
        record = table(config, RECORD)
        # An adapter that was converted, or saved on the way, has the record alone.
        own = settings.is_file()
        run = parse_yaml(read_text(settings), str(settings)) if own else record.get("config")
        return Folder(path, kind, config, record, run, optional_json(path / "summary.json"))
    record = optional_json(path / RECORD_FILE)
    run, result = at(record, "training.config"), at(record, "training.summary")
    return Folder(path, kind, config, record, run, result)


def kind_of(path: Path) -> Kind:
    """Which kind of folder this is; raises as `open_folder` does."""
    models = sorted(path.glob(MODEL_WEIGHTS))
    is_model = (path / MODEL_CONFIG).is_file() and bool(models)
    is_adapter = (path / CONFIG).is_file()
    if is_model and is_adapter:
        raise SimPOError(
            f"{path} holds a model and an adapter; it must be one of them: move the other out"
        )
    if is_adapter:
        kind = PEFT if "peft_type" in read_json(path / CONFIG) else RUN
        if not (path / kind.weights).is_file():
            raise SimPOError(
                f"{path} has no {kind.weights}, which a {kind.what} needs; weights in another "
                "format must be saved as safetensors first"
            )
        return kind
    if not is_model:
        raise SimPOError(
            f"{path} holds neither an adapter ({CONFIG} with {WEIGHTS} or "
            f"{PEFT_WEIGHTS}) nor a model ({MODEL_CONFIG} with model.safetensors); name the "
            "output folder of a training"
        )
    formats = {read_header(file).format or "nothing" for file in models}
    kind = BY_FORMAT.get(next(iter(formats))) if len(formats) == 1 else None
    if kind is None:
        found = ", ".join(sorted(formats)) or "none"
        raise SimPOError(
            f"the weights in {path} are marked with the format {found}; it must be pt "
            "(transformers) or mlx: save the model again with save_pretrained or mlx-lm"
        )
    return kind


def read_text(file: Path) -> str:
    """A text file.

    Raises:
        SimPOError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SimPOError(f"cannot read {file}: {error}; mend it or move it out") from None


def optional_json(file: Path) -> dict[str, Any]:
    """`read_json` of a file that need not exist; then it is empty."""
    return read_json(file) if file.is_file() else {}


class Public(NamedTuple):
    """How others may read a name. on_hub: it is a Hub id; if not, text is a local path's last part,
    for what stands before it is the user's own."""

    text: str
    on_hub: bool


def public_name(name: str, folder: Path) -> Public:
    """The public form of a model's or data set's name in the record of ``folder``.

    A name such as models/tiny may be either; it is local if it exists below the present folder or
    one of those that ``folder`` lies in, where the training may have stood.
    """
    if is_local(name, folder) or _DATA_FILE.search(name):
        return Public(last_part(name), False)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return Public(last_part(name), False)
    return Public(name, True)


def is_local(name: str, folder: Path) -> bool:
    """Whether a name has the form of a local path, or is that of something that exists."""
    roots = [Path(), *folder.absolute().parents]
    # os.path.exists is False for what can be no name at all, where Path.exists raises.
    return bool(_LOCAL_FORM.match(name)) or any(os.path.exists(root / name) for root in roots)


def last_part(name: str) -> str:
    """The last part of a path of any system; "a local folder" if it has none ("/", "..")."""
    part = PureWindowsPath(name).name
    return part if part.strip(". ") else "a local folder"
