"""A model and its tokenizer from a local folder or the Hugging Face Hub, by mlx_lm's loader."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from mlx_lm import load as mlx_lm_load
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, load_config, load_tokenizer

from ..errors import SimPOError, one_line
from ..files import read_header, weight_files
from ..paths import local_path
from .adapters import flat_arrays
from .repair import repaired

# What loaders raise at a config.json, tokenizer or weights that are not what they expect.
LOAD_ERRORS = (
    ImportError,
    MemoryError,
    NameError,
    AssertionError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class LoadedModel(NamedTuple):
    """A model ready to run. config: its config.json, repaired; dtype: of its weights; folder: where
    it was read from; name and revision: as asked for, the revision of a Hub model as its commit."""

    model: nn.Module
    tokenizer: Any
    config: dict
    dtype: str
    folder: Path
    name: str
    revision: str | None


def model_folder(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model; fetched from the Hub if ``name`` is no folder.

    Args:
        weights: fetch the weights too, not only configuration and tokenizer.

    Raises:
        SimPOError: nothing by that name, no network, or no language model in there.
    """
    path = local_path(name)
    if path.exists():
        if revision is not None:
            raise SimPOError(
                f"revision is {revision!r}, but {name} is a local folder; leave it out"
            )
        if not (path / "config.json").is_file():
            raise SimPOError(f"{name} holds no config.json; it must be the folder of a model")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SimPOError(f"model is {name!r}; there is no such folder")
    patterns = [p for p in DEFAULT_ALLOW_PATTERNS if weights or "safetensors" not in p]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise SimPOError(
            f"model is {name!r}; it is no local folder and could not be fetched from the Hugging "
            f"Face Hub: {one_line(error)}"
        ) from None


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model with its tokenizer; the weights are read from disk when first used.

    Args:
        name: local folder or Hub id.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16": of everything that is not
            packed into quantized codes; of those, the scales.

    Raises:
        SimPOError: no such model, or one that mlx_lm cannot load as a language model.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise SimPOError(f"dtype is {dtype!r}; it must be one of auto, {', '.join(DTYPES)}")
    folder = model_folder(name, revision)
    tensors = sum(len(read_header(path).shapes) for path in weight_files(folder))
    with explained(f"{name} cannot be loaded as a language model"):
        config = load_config(folder)
        check_config(config, tensors)
        model, tokenizer, config = mlx_lm_load(  # type: ignore[misc]
            str(folder),
            lazy=True,
            return_config=True,
            model_config=repaired(config),
            # Said also where it is False: without an answer transformers asks for one.
            tokenizer_config={"trust_remote_code": trust_remote_code},
            trust_remote_code=trust_remote_code,
        )
    if not hasattr(model, "layers"):
        raise SimPOError(f"{name} is a {config.get('model_type')} model without transformer blocks")
    if dtype != "auto":
        model.set_dtype(DTYPES[dtype])
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return LoadedModel(model, tokenizer, config, dtype_of(model), folder, name, commit)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what loaders raise at files that they do not expect into one line."""
    try:
        yield
    except LOAD_ERRORS as error:
        raise SimPOError(f"{what}: {type(error).__name__}: {one_line(error, 300)}") from None
    except Exception as error:
        if type(error) is Exception:  # what the tokenizers library raises has no class of its own
            raise SimPOError(f"{what}: {one_line(error, 300)}") from None
        raise


def check_config(config: dict[str, Any], tensors: int) -> None:
    """ValueError for a config.json that no model can have, before anything is made of it.

    Args:
        tensors: how many the model's files have.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", kind):
        # mlx-lm imports a module of that name.
        raise ValueError(f"model_type is {str(kind)[:60]!r} in its config.json, which is no name")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        layers = part.get("num_hidden_layers")
        if isinstance(layers, int) and layers > tensors:
            raise ValueError(f"num_hidden_layers is {layers}, but its files hold {tensors} tensors")


def load_only_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> Any:
    """The tokenizer that `load_model` would return, without fetching or reading the weights.

    Raises:
        SimPOError: no such model, or no tokenizer in its folder.
    """
    folder = model_folder(name, revision, weights=False)
    with explained(f"{name} has no tokenizer that can be loaded"):
        return load_tokenizer(
            folder,
            {"trust_remote_code": trust_remote_code},
            eos_token_ids=load_config(folder).get("eos_token_id"),
        )


def dtype_of(model: nn.Module) -> str:
    """The dtype the model computes in: that of its first norm, bias or weight that is a float."""
    for value in flat_arrays(model.parameters()).values():
        if mx.issubdtype(value.dtype, mx.floating):
            return str(value.dtype).rpartition(".")[2]
    raise SimPOError("the model has no floating-point weights")
