"""What tokens depend on, as a key: the same key, the same tokens.

Contents count, not names of folders: those of the data, of the tokenizer and of the template. The
places that messages name ("file:line") are part of what is kept, so the data's names count as well.
"""

import hashlib
import inspect
import json
import tempfile
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from .encode import Encoder
from .sources import Source

# Raise FORMAT when the files of `tokens` change, and RULES when a record can give other tokens, or
# be refused for another reason, than before (records, render, encode, official): what was kept is
# then made anew. A test compares the tokens of some pairs with those recorded for RULES.
FORMAT = 1
RULES = 1
# Their code has a say in the tokens; what is not installed has none.
PACKAGES = ("transformers", "tokenizers", "mlx-lm", "jinja2", "sentencepiece", "tiktoken")
# Where a tokenizer came from, as transformers writes it among its settings.
ORIGINS = ("name_or_path", "is_local", "local_files_only", "_commit_hash")


class NoKeyError(Exception):
    """Why it cannot be told what the tokens depend on."""


def token_key(encoder: Encoder, source: Source) -> str:
    """The key (32 hexadecimal digits) of a source's tokens as this encoder makes them.

    Raises:
        NoKeyError: data in memory alone, or a tokenizer that cannot be written out.
        OSError: the data cannot be read.
    """
    config = encoder.config
    decisive = {
        "format": FORMAT,
        "rules": RULES,
        "packages": {name: version(name) for name in PACKAGES},
        "data": source_identity(source),
        "tokenizer": tokenizer_identity(encoder.tokenizer),
        "template": template_identity(encoder),
        "special": [encoder.bos, encoder.eos, sorted(encoder.stops)],
        "settings": [
            config.compat,
            config.max_length,
            config.max_prompt_length,
            config.implicit_string_prompts,
        ],
    }
    return digest(json.dumps(decisive, sort_keys=True).encode())


def source_identity(source: Source) -> list:
    """What tells a source from any other; NoKeyError where nothing does."""
    if not source.files:
        raise NoKeyError(f"{source.name} has no files that would tell when it changes")
    return [source.labels, [file_sha256(path) for path in source.files]]


def template_identity(encoder: Encoder) -> list:
    """What decides the text of a conversation besides the tokenizer's files and settings."""
    renderer, tokenizer = encoder.renderer, encoder.tokenizer
    in_python = getattr(tokenizer, "_chat_template", None)  # mlx-lm's renderers, as functions
    name = f"{in_python.__module__}.{in_python.__qualname__}" if in_python else None
    own = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True, default=str)
    # Llama 3's templates write today's date into each system turn.
    dated = "strftime_now" in (renderer.text or "") + own
    today = datetime.now().astimezone().date().isoformat() if dated else None
    return [renderer.plain, renderer.text, own, name, today]


def tokenizer_identity(tokenizer: Any) -> list:
    """The tokenizer's files as transformers writes them, and the code that uses them.

    Raises:
        NoKeyError: it cannot be written, or its class stands in no file.
    """
    inner = getattr(tokenizer, "_tokenizer", tokenizer)  # in mlx-lm's wrapper
    inner = inner if hasattr(inner, "save_pretrained") else tokenizer
    classes = [*type(tokenizer).__mro__, *type(inner).__mro__]
    try:
        code = [f"{c.__module__}.{c.__qualname__} {code_sha256(c)}" for c in classes]
        with tempfile.TemporaryDirectory() as folder:
            inner.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return [code, [[path.name, contents_sha256(path)] for path in files]]
    except (OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise NoKeyError(f"the tokenizer cannot be written to files ({error})") from None


def code_sha256(found: type) -> str:
    """The hash of the file that defines a class, empty for packages, whose versions count."""
    package = found.__module__.split(".")[0].replace("_", "-")
    if package in (*PACKAGES, "builtins"):
        return ""
    return file_sha256(Path(inspect.getfile(found)))


def contents_sha256(path: Path) -> str:
    """The hash of one of a tokenizer's files, without what it says of its origin."""
    if path.name != "tokenizer_config.json":
        return file_sha256(path)
    settings = json.loads(path.read_text("utf-8"))
    kept = {name: value for name, value in settings.items() if name not in ORIGINS}
    return digest(json.dumps(kept, sort_keys=True).encode())


def file_sha256(path: Path) -> str:
    """The hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: bytes) -> str:
    """The first 128 bits of SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]


def version(package: str) -> str | None:
    """The installed version of a package; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
