"""The cache key of tokens: datasets and encoders with the same key give the same tokens.

The key covers contents, not locations: of the data, the tokenizer and the chat template. Only the
names of the data's files count as well, because cached tokens hold the "file:line" of each pair.
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
from .rows import Source

# Raise FORMAT when the files of `tokens` change, and RULES when a record can give other tokens, or
# be quarantined for another reason, than before (records to encode and official): tokens cached
# by earlier versions are then not used any more. A test compares the tokens of some pairs with
# those recorded for RULES.
FORMAT = 2
RULES = 4
# Packages whose code affects the tokens, so that their versions count.
PACKAGES = ("transformers", "tokenizers", "mlx-lm", "jinja2", "sentencepiece", "tiktoken")
# Settings in which transformers records where a tokenizer was loaded from.
LOCATION_SETTINGS = ("name_or_path", "is_local", "local_files_only", "_commit_hash")


class NotCacheableError(Exception):
    """A change of the data or the tokenizer could go unnoticed; the message tells the user why."""


def token_key(encoder: Encoder, source: Source) -> str:
    """Return the key (32 hexadecimal digits) of the tokens that ``encoder`` makes of ``source``.

    Raises:
        NotCacheableError: the data has no files, or the tokenizer cannot be saved.
        OSError: the data cannot be read.
    """
    config, special = encoder.config, encoder.special
    key_parts = {
        "format": FORMAT,
        "rules": RULES,
        "packages": {name: installed_version(name) for name in PACKAGES},
        "data": source_identity(source),
        "tokenizer": tokenizer_identity(encoder.tokenizer),
        "template": template_identity(encoder),
        "special": [special.bos, special.eos, sorted(special.ends)],
        "settings": [
            config.compat,
            config.score,
            config.template_args,
            config.max_length,
            config.max_prompt_length,
            config.implicit_string_prompts,
        ],
    }
    # default=str: template_args may hold anything that YAML can write, dates for example.
    return short_sha256(json.dumps(key_parts, sort_keys=True, default=str).encode())


def source_identity(source: Source) -> list:
    """Return what distinguishes a source from any other: its labels and its files' hashes.

    Raises:
        NotCacheableError: it has no files.
        OSError: a file cannot be read.
    """
    if not source.files:
        raise NotCacheableError(f"{source.name} has no files that would reveal a change")
    return [source.labels, [file_sha256(path) for path in source.files]]


def template_identity(encoder: Encoder) -> list:
    """Return what decides a conversation's text apart from the tokenizer's files.

    These hold the tokenizer's own templates.
    """
    renderer, tokenizer = encoder.renderer, encoder.tokenizer
    # mlx-lm has templates written in Python for some models: functions in its own modules.
    in_python = getattr(tokenizer, "_chat_template", None)
    name = f"{in_python.__module__}.{in_python.__qualname__}" if in_python else None
    # Llama 3's templates write today's date into each system turn. A tokenizer may have several.
    has_date = "strftime_now" in f"{renderer.text} {getattr(tokenizer, 'chat_template', None)}"
    today = datetime.now().astimezone().date().isoformat() if has_date else None
    return [renderer.is_plain_text, renderer.text, name, today]


def tokenizer_identity(tokenizer: Any) -> list:
    """Return the hashes of the tokenizer's files, as transformers saves them, and of its code.

    Raises:
        NotCacheableError: it cannot be saved, or one of its classes is not defined in a file.
    """
    inner = tokenizer._tokenizer  # mlx-lm's wrapper holds transformers' own
    classes = [*type(tokenizer).__mro__, *type(inner).__mro__]
    try:
        code = [f"{c.__module__}.{c.__qualname__} {code_sha256(c)}" for c in classes]
        with tempfile.TemporaryDirectory() as folder:
            inner.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return [code, [[path.name, tokenizer_file_sha256(path)] for path in files]]
    except (OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise NotCacheableError(f"the tokenizer cannot be saved ({error})") from None


def code_sha256(cls: type) -> str:
    """Return the hash of the file that defines a class; "" for PACKAGES, whose versions count."""
    package = cls.__module__.split(".")[0].replace("_", "-")
    if package in (*PACKAGES, "builtins"):
        return ""
    return file_sha256(Path(inspect.getfile(cls)))


def tokenizer_file_sha256(path: Path) -> str:
    """Return the hash of one of a tokenizer's files, ignoring where it was loaded from."""
    if path.name != "tokenizer_config.json":
        return file_sha256(path)
    settings = json.loads(path.read_text("utf-8"))
    relevant = {name: value for name, value in settings.items() if name not in LOCATION_SETTINGS}
    return short_sha256(json.dumps(relevant, sort_keys=True).encode())


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_sha256(content: bytes) -> str:
    """Return the first 128 bits of the SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
