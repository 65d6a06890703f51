"""A folder that can be shared: of which kind it is, and what it says about its training."""

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
from ..model.record import RECORD_FILE, RECORD_KEY, get_dict
from ..paths import local_path

MODEL_CONFIG = "config.json"
# Absolute, in a home folder, or relative to a working folder; with a drive or a share on Windows.
_LOCAL_FORM = re.compile(r"^(?:/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
_DATA_FILE = re.compile(r"\.(?:jsonl|jsonl\.gz|json|parquet)$")


class FolderKind(NamedTuple):
    """A kind of folder.

    name: for programs. description: for people. library, relation, tags: the Hub's library_name,
    base_model_relation and tags. weights: pattern of the names of the weight files.
    """

    name: str
    description: str
    library: str
    relation: str
    tags: tuple[str, ...]
    weights: str


RUN = FolderKind("run", "LoRA adapter for mlx-lm", "mlx", "adapter", ("lora", "mlx"), WEIGHTS)
PEFT = FolderKind(
    "peft", "LoRA adapter for PEFT", "peft", "adapter", ("lora", "peft"), PEFT_WEIGHTS
)
HF = FolderKind("transformers", "model", "transformers", "finetune", (), MODEL_WEIGHTS)
MLX = FolderKind("mlx", "model for mlx-lm", "mlx", "finetune", ("mlx",), MODEL_WEIGHTS)
_KIND_BY_FORMAT = {"pt": HF, "mlx": MLX}


class PublicName(NamedTuple):
    """A name as others may read it.

    on_hub: text is a Hub id. Otherwise it is the last part of a local path: the folders before it
    stay private.
    """

    text: str
    on_hub: bool


@dataclass(frozen=True)
class Folder:
    """An opened folder.

    config: adapter_config.json or config.json. record: of the training, from mlx_simpo.json or
    adapter_config.json. settings: the run's, as nested mappings. summary: the run's results. The
    last three may be empty, and settings and summary None or of any type.
    """

    path: Path
    kind: FolderKind
    config: dict[str, Any]
    record: dict[str, Any]
    settings: Any
    summary: Any

    @property
    def base(self) -> str | None:
        """The base model; for PEFT the one that its own configuration names."""
        named = self.config.get("base_model_name_or_path") if self.kind is PEFT else None
        return as_text(named) or self.trained_on

    @property
    def trained_on(self) -> str | None:
        """The model that was trained on, which may be a quantized form of `base`."""
        candidates = [lookup(self.record, "base.model"), lookup(self.settings, "model")]
        candidates += [self.config.get("model")] if self.kind is RUN else []
        return next((name for name in map(as_text, candidates) if name), None)

    @property
    def revision(self) -> str | None:
        """The revision of `base`, if the record has one."""
        if self.base != self.trained_on:
            return None
        return as_text(lookup(self.record, "base.revision") or lookup(self.settings, "revision"))

    def public_name(self, name: Any) -> PublicName | None:
        """Return `public_name` of a value from the record; None if it is not text."""
        text = as_text(name)
        return None if text is None else public_name(text, self.path)


def as_text(value: Any) -> str | None:
    """Return ``value`` if it is text that is not blank, else None."""
    return value if isinstance(value, str) and value.strip() else None


def lookup(values: Any, path: str) -> Any:
    """Return the value at a dotted path in nested mappings; None where any part is missing."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def open_folder(name: str | Path) -> Folder:
    """Return the folder of this name with its kind and its record.

    Raises:
        SimPOError: there is no such folder, it holds neither an adapter nor a model (or both), or
            files that cannot be read.
    """
    path = local_path(name)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise SimPOError(f"{str(name)!r} {problem}; name the folder of an adapter or a model")
    kind = find_kind(path)
    config = read_json(path / (CONFIG if kind.relation == "adapter" else MODEL_CONFIG))
    if kind is not RUN:
        record = read_optional_json(path / RECORD_FILE)
        training = get_dict(record, "training")
        return Folder(path, kind, config, record, training.get("config"), training.get("summary"))
    record = get_dict(config, RECORD_KEY)
    settings_file = path / "config.yaml"
    if settings_file.is_file():
        settings = parse_yaml(read_text(settings_file), str(settings_file))
    else:
        # An adapter that was converted, or saved during the training, has the record alone.
        settings = record.get("config")
    return Folder(path, kind, config, record, settings, read_optional_json(path / "summary.json"))


def find_kind(path: Path) -> FolderKind:
    """Return the kind of a folder.

    Raises:
        SimPOError: it holds neither an adapter nor a model (or both), or files that cannot be read.
    """
    models = sorted(path.glob(MODEL_WEIGHTS))
    is_model = (path / MODEL_CONFIG).is_file() and bool(models)
    is_adapter = (path / CONFIG).is_file()
    if is_model and is_adapter:
        raise SimPOError(
            f"{path} holds a model and an adapter; it must hold one of them: move the other out"
        )
    if is_adapter:
        kind = PEFT if "peft_type" in read_json(path / CONFIG) else RUN
        if not (path / kind.weights).is_file():
            raise SimPOError(
                f"{path} has no {kind.weights}, which a {kind.description} needs; weights in "
                "another format must be saved as safetensors first"
            )
        return kind
    if not is_model:
        raise SimPOError(
            f"{path} holds neither an adapter ({CONFIG} with {WEIGHTS} or "
            f"{PEFT_WEIGHTS}) nor a model ({MODEL_CONFIG} with model.safetensors); name the "
            "output folder of a training"
        )
    formats = {read_header(file).format or "nothing" for file in models}
    kind = _KIND_BY_FORMAT.get(next(iter(formats))) if len(formats) == 1 else None
    if kind is None:
        raise SimPOError(
            f"the weights in {path} are marked with the format {', '.join(sorted(formats))}; it "
            "must be pt (transformers) or mlx: save the model again with save_pretrained or mlx-lm"
        )
    return kind


def read_text(file: Path) -> str:
    """Read a text file.

    Raises:
        SimPOError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SimPOError(f"cannot read {file}: {error}; fix it or move it out") from None


def read_optional_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or an empty dict if there is no such file."""
    return read_json(file) if file.is_file() else {}


def public_name(name: str, folder: Path) -> PublicName:
    """Return the public form of a model's or dataset's name in the record of ``folder``.

    A name such as models/tiny may be a Hub id or a path; `is_local_path` decides.
    """
    if is_local_path(name, folder) or _DATA_FILE.search(name):
        return PublicName(last_path_part(name), False)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return PublicName(last_path_part(name), False)
    return PublicName(name, True)


def is_local_path(name: str, folder: Path) -> bool:
    """Return whether a name in the record of ``folder`` is a local path.

    It is one by its form, or if it exists in the working folder or in a parent of ``folder``, where
    the training may have been started.
    """
    roots = [Path(), *folder.absolute().parents]
    # os.path.exists is False for what cannot be a file name at all, where Path.exists raises.
    return bool(_LOCAL_FORM.match(name)) or any(os.path.exists(root / name) for root in roots)


def last_path_part(name: str) -> str:
    """Return the last part of a path of any system; "a local folder" for "/" and ".."."""
    part = PureWindowsPath(name).name
    return part if part.strip(". ") else "a local folder"
