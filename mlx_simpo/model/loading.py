"""Load a model and its tokenizer from a local folder or the Hugging Face Hub, with mlx_lm."""

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
from ..files import read_header, read_json, weight_files
from ..paths import local_path
from .adapters import flat_arrays
from .repair import config_repairs
from .trainable import make_trainable

# What mlx_lm and transformers raise for an unexpected config.json, tokenizer or weights.
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
# The JSON objects of a model folder that these libraries read without naming the file in an error.
JSON_FILES = (
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "hf_quant_config.json",
)
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class LoadedModel(NamedTuple):
    """A model with its tokenizer, ready to run.

    config: the content of its config.json, repaired. dtype: of its floating-point weights. folder:
    where it was read from. name: as in the settings. revision: as in the settings; for a model from
    the Hub, its commit.
    """

    model: nn.Module
    tokenizer: Any
    config: dict
    dtype: str
    folder: Path
    name: str
    revision: str | None


def model_folder(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the local folder of a model, downloaded from the Hub if ``name`` is not a folder.

    Args:
        weights: download the weights too, not only configuration and tokenizer.

    Raises:
        SimPOError: there is no such model, it cannot be downloaded, or the folder has no
            config.json.
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
            f"model is {name!r}; it is not a local folder and could not be downloaded from "
            f"the Hugging Face Hub: {one_line(error)}"
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
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16", for all weights except
            quantized codes; the codes' scales and biases are included.

    Raises:
        SimPOError: there is no such model, or mlx_lm cannot load it as a language model.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise SimPOError(f"dtype is {dtype!r}; it must be one of auto, {', '.join(DTYPES)}")
    folder = model_folder(name, revision)
    num_tensors = sum(len(read_header(path).shapes) for path in weight_files(folder))
    with loader_errors(f"{name} cannot be loaded as a language model", folder):
        config = load_config(folder)
        check_config(config, num_tensors)
        model, tokenizer, config = mlx_lm_load(  # type: ignore[misc]
            str(folder),
            lazy=True,
            return_config=True,
            model_config=config_repairs(config),
            # Passed even if False: without it transformers asks on the terminal.
            tokenizer_config={"trust_remote_code": trust_remote_code},
            trust_remote_code=trust_remote_code,
        )
    if not hasattr(model, "layers"):
        raise SimPOError(f"{name} is a {config.get('model_type')} model without a list of layers")
    make_trainable(model)
    if dtype != "auto":
        model.set_dtype(DTYPES[dtype])
    # huggingface_hub stores a model in …/snapshots/<commit>.
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return LoadedModel(model, tokenizer, config, dtype_of(model), folder, name, commit)


@contextmanager
def loader_errors(problem: str, folder: Path) -> Iterator[None]:
    """Within the context, turn errors of mlx_lm and transformers into one line after ``problem``.

    Args:
        folder: of the model; a file of it that is not valid JSON is named as the reason.

    Raises:
        SimPOError: in place of any of `LOAD_ERRORS`.
    """
    try:
        yield
    except LOAD_ERRORS as error:
        for path in (folder / name for name in JSON_FILES):
            if path.exists():
                try:
                    read_json(path)
                except SimPOError as damage:
                    raise SimPOError(f"{problem}: {damage}; download the model again") from None
        raise SimPOError(f"{problem}: {type(error).__name__}: {one_line(error, 300)}") from None
    except Exception as error:
        if type(error) is Exception:  # the tokenizers library raises this class itself
            raise SimPOError(f"{problem}: {one_line(error, 300)}") from None
        raise


def check_config(config: dict[str, Any], num_tensors: int) -> None:
    """Check what mlx_lm trusts in a config.json before it builds a model from it.

    Args:
        num_tensors: in all of the model's files.

    Raises:
        ValueError: the model type is not a name, or there are more layers than tensors.
    """
    model_type = config.get("model_type")
    # mlx-lm imports a module of this name.
    if not isinstance(model_type, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", model_type):
        raise ValueError(
            f"model_type is {str(model_type)[:60]!r} in its config.json; it must be a name of "
            "letters, digits, - and _"
        )
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        num_layers = part.get("num_hidden_layers")
        # A billion of them would use up the memory before a missing weight is noticed.
        if isinstance(num_layers, int) and num_layers > num_tensors:
            raise ValueError(
                f"num_hidden_layers is {num_layers}, but its files hold {num_tensors} tensors"
            )


def load_only_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer that `load_model` would return, without the weights.

    Raises:
        SimPOError: there is no such model, or it has no tokenizer that can be loaded.
    """
    folder = model_folder(name, revision, weights=False)
    with loader_errors(f"{name} has no tokenizer that can be loaded", folder):
        return load_tokenizer(
            folder,
            {"trust_remote_code": trust_remote_code},
            eos_token_ids=load_config(folder).get("eos_token_id"),
        )


def dtype_of(model: nn.Module) -> str:
    """Return the name of the dtype that a model computes in: its first floating-point parameter's.

    Raises:
        SimPOError: the model has no floating-point parameters.
    """
    for value in flat_arrays(model.parameters()).values():
        if mx.issubdtype(value.dtype, mx.floating):
            return str(value.dtype).rpartition(".")[2]
    raise SimPOError("the model has no floating-point weights")
