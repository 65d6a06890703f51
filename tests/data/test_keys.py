"""The key changes with whatever can change a token or a message, and with nothing else."""

import datetime
import hashlib
import json
import pickle
import shutil
import sys
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_templates import TEMPLATES
from helpers.tiny import (
    BARE,
    CHATML,
    INST,
    assistant,
    some_pairs,
    system,
    tiny_tokenizer,
    user,
    write_jsonl,
)

from mlx_simpo import DataConfig
from mlx_simpo.data import keys
from mlx_simpo.data.encode import Encoder
from mlx_simpo.data.keys import RULES, NotCacheableError, token_key
from mlx_simpo.data.pairs import Quarantined
from mlx_simpo.data.rows import Row, Source
from mlx_simpo.data.sources import open_source
from mlx_simpo.data.tokenize import encode_row
from mlx_simpo.model.loading import load_only_tokenizer


def source(path: Path, **changes: Any) -> Source:
    return open_source(str(write_jsonl(path, [some_pairs(1)[0] | changes])))


@pytest.fixture
def pairs(tmp_path: Path) -> Source:
    return source(tmp_path / "pairs.jsonl")


def key(pairs: Source, tokenizer: Any = None, **config: Any) -> str:
    return token_key(Encoder(tokenizer or tiny_tokenizer(), DataConfig(**config)), pairs)


def test_the_same_inputs_have_the_same_key(pairs: Source) -> None:
    assert key(pairs) == key(open_source(pairs.name))
    assert len(key(pairs)) == 32


@pytest.mark.parametrize(
    "setting",
    [
        {"max_length": 1000},
        {"max_prompt_length": 500},
        {"implicit_string_prompts": True},
        {"chat_template": "none"},
        {"chat_template": CHATML + " "},
    ],
)
def test_settings_that_affect_tokens(pairs: Source, setting: dict[str, Any]) -> None:
    assert key(pairs, **setting) != key(pairs)


def test_what_the_template_gets_and_what_counts(pairs: Source) -> None:
    tokenizer = tiny_tokenizer(CHATML + "{{ a }}{{ b }}")
    settings: list[dict[str, Any]] = [
        {},
        {"score": "after_thinking"},
        {"template_args": {"a": 1}},
        {"template_args": {"a": "1"}},
        {"template_args": {"a": True}},
        {"template_args": {"b": 1}},
        {"template_args": {"a": datetime.date(2026, 1, 2)}},
    ]
    assert len({key(pairs, tokenizer, **setting) for setting in settings}) == len(settings)
    one, other = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert key(pairs, tokenizer, template_args=one) == key(pairs, tokenizer, template_args=other)


def test_compat_official_has_a_key_of_its_own(pairs: Source) -> None:
    tokenizer = tiny_tokenizer(INST, bos="<s>")
    assert key(pairs, tokenizer, compat="official") != key(pairs, tokenizer)


@pytest.mark.parametrize(
    "setting", [{"max_quarantined": 0.5}, {"valid_fraction": 0.2}, {"chat_template": CHATML}]
)
def test_settings_that_do_not_affect_tokens(pairs: Source, setting: dict[str, Any]) -> None:
    assert key(pairs, **setting) == key(pairs)


def test_a_template_file_counts_by_its_text(pairs: Source, tmp_path: Path) -> None:
    distinct = set()
    for name, text in (("a", BARE), ("b", BARE), ("a", BARE + " ")):
        (tmp_path / name).write_text(text)
        distinct.add(key(pairs, chat_template=str(tmp_path / name)))
    assert len(distinct) == 2


def named_templates(**templates: str) -> Any:
    """A tokenizer with several templates, of which it chooses one itself."""
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.chat_template = templates
    return tokenizer


def template_in_python(template: Any) -> Any:
    """A tokenizer whose template is a function, as mlx-lm has for some models."""
    tokenizer = tiny_tokenizer(None)
    tokenizer._chat_template = template
    tokenizer.has_chat_template = True
    return tokenizer


def changed_tokenizers() -> dict[str, Any]:
    with_token, ends, unstripped = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    with_token._tokenizer.add_tokens(["<new>"])
    ends.add_eos_token("a")  # as generation configs do
    unstripped._tokenizer.backend_tokenizer.pre_tokenizer = None
    return {
        "templates": named_templates(default=CHATML, tool_use=BARE),
        "another of the templates": named_templates(default=CHATML, tool_use=INST),
        "template in Python": template_in_python(json.dumps),
        "another in Python": template_in_python(json.loads),
        "of the same name": template_in_python(pickle.dumps),
        "template": tiny_tokenizer(BARE),
        "no template": tiny_tokenizer(None),
        "bos": tiny_tokenizer(bos="<s>"),
        "adds bos": tiny_tokenizer(bos="<s>", adds_bos=True),
        "token": with_token,
        "end of turn": ends,
        "pre-tokenizer": unstripped,
    }


def test_every_part_of_the_tokenizer_counts(pairs: Source) -> None:
    by_change = {name: key(pairs, tokenizer) for name, tokenizer in changed_tokenizers().items()}
    assert len({*by_change.values(), key(pairs)}) == len(by_change) + 1


@pytest.mark.parametrize("change", [{"bos": [5]}, {"eos": 5}, {"ends": {5}}], ids=str)
def test_the_tokens_around_a_sequence_count(pairs: Source, change: dict[str, Any]) -> None:
    encoder = Encoder(tiny_tokenizer(), DataConfig())
    vars(encoder.special).update(change)
    assert token_key(encoder, pairs) != key(pairs)


def test_plain_text_counts_where_there_is_no_one_template(pairs: Source) -> None:
    """A tokenizer with several templates has no text of a template either."""
    tokenizer = named_templates(default=CHATML, tool_use=BARE)
    assert key(pairs, tokenizer, chat_template="none") != key(pairs, tokenizer)


@pytest.mark.parametrize("name", ["name_or_path", "is_local", "local_files_only", "_commit_hash"])
def test_where_a_tokenizer_was_loaded_from_does_not_count(name: str, tmp_path: Path) -> None:
    """But every other setting does, and the same words in another file."""

    def hashed(file: str, settings: dict[str, Any]) -> str:
        (tmp_path / file).write_text(json.dumps(settings), encoding="utf-8")
        return keys.tokenizer_file_sha256(tmp_path / file)

    plain = hashed("tokenizer_config.json", {"a": 1, "b": 2})
    assert hashed("tokenizer_config.json", {name: "there", "b": 2, "a": 1}) == plain
    assert hashed("tokenizer_config.json", {"a": 1, "b": 3}) != plain
    assert hashed("x.json", {name: "there"}) != hashed("x.json", {name: "here"})


def test_packages_that_are_not_installed_have_no_version() -> None:
    assert keys.installed_version("no-such-package") is None
    assert keys.installed_version("jinja2") == metadata.version("jinja2")


def test_the_code_of_a_tokenizer_counts(
    pairs: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it comes with some models: its class, the classes that this one is of, and the wrapper."""
    tokenizer = tiny_tokenizer()
    distinct = {key(pairs, tokenizer)}
    monkeypatch.syspath_prepend(tmp_path)
    code = {
        "our_base": "from transformers import PreTrainedTokenizerFast\n"
        "class Base(PreTrainedTokenizerFast): pass\n",
        "our_own": "from our_base import Base\nclass Own(Base): pass\n",
        "our_wrapper": "from mlx_lm.tokenizer_utils import TokenizerWrapper\n"
        "class Wrapper(TokenizerWrapper): pass\n",
    }
    for name, text in code.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    own, wrapper = import_module("our_own").Own, import_module("our_wrapper").Wrapper
    tokenizer._tokenizer.__class__ = own
    distinct.add(key(pairs, tokenizer))
    tokenizer.__class__ = wrapper
    distinct.add(key(pairs, tokenizer))
    for name, text in code.items():
        (tmp_path / f"{name}.py").write_text(f"{text}# changed\n")
        distinct.add(key(pairs, tokenizer))
    assert len(distinct) == 3 + len(code)


def test_a_copy_of_the_tokenizer_has_the_same_key(
    model_folder: Path, pairs: Source, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "copy")
    first, second = (load_only_tokenizer(str(f)) for f in (model_folder, tmp_path / "copy"))
    assert key(pairs, first) == key(pairs, second)


def test_using_the_tokenizer_does_not_change_the_key(pairs: Source) -> None:
    encoder = Encoder(tiny_tokenizer(), DataConfig())
    before = token_key(encoder, pairs)
    for row in pairs.rows():
        encode_row(encoder, row)
    assert token_key(encoder, pairs) == before


def test_the_contents_and_the_names_of_the_data_files_count(tmp_path: Path) -> None:
    one = key(source(tmp_path / "a.jsonl"))
    assert one == key(source(tmp_path / "a.jsonl"))  # written again
    others = {
        key(source(tmp_path / "b.jsonl")),
        key(source(tmp_path / "a.jsonl", prompt="another")),
        key(source(tmp_path / "a.jsonl", extra=1)),
    }
    assert len({one, *others}) == 4


def test_each_file_of_a_folder_counts(tmp_path: Path) -> None:
    distinct = set()
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write_jsonl(tmp_path / name, some_pairs(2))
        distinct.add(key(open_source(str(tmp_path))))
    write_jsonl(tmp_path / "b.jsonl", some_pairs(3))
    assert len({*distinct, key(open_source(str(tmp_path)))}) == 4


def test_a_template_that_writes_the_date_has_a_new_key_each_day(
    pairs: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = CHATML.replace("Be kind.", "Today is {{ strftime_now('%d %b %Y') }}.")

    def keys_on(day: int, hour: int = 12) -> tuple[str, ...]:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime.datetime:
                return datetime.datetime(2026, 1, day, hour)

        monkeypatch.setattr(keys, "datetime", Clock)
        return (
            key(pairs, tiny_tokenizer(dated)),
            key(pairs, chat_template=dated),
            key(pairs, named_templates(default=CHATML, tool_use=dated)),
            key(pairs, named_templates(default=CHATML, tool_use=BARE)),
            key(pairs, tiny_tokenizer(None)),
            key(pairs),
        )

    first, second = keys_on(1), keys_on(2)
    same = [a == b for a, b in zip(first, second, strict=True)]
    assert same == [False, False, False, True, True, True]
    assert first == keys_on(1, hour=9)


@pytest.mark.parametrize("name", ["FORMAT", "RULES"])
def test_a_new_format_or_new_rules_give_a_new_key(
    pairs: Source, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = key(pairs)
    monkeypatch.setattr(keys, name, 1000)
    assert key(pairs) != before


def test_the_version_of_each_package_counts(pairs: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = ("transformers", "tokenizers", "mlx-lm", "jinja2", "sentencepiece", "tiktoken")
    distinct, installed = {key(pairs)}, keys.installed_version
    for package in packages:
        versions = {name: installed(name) for name in packages} | {package: "0.0"}
        monkeypatch.setattr(keys, "installed_version", versions.get)
        distinct.add(key(pairs))
    assert len(distinct) == 1 + len(packages)


def test_data_in_memory_has_no_key(pairs: Source) -> None:
    with pytest.raises(NotCacheableError, match="has no files that would reveal a change"):
        key(replace(pairs, files=()))


def test_a_tokenizer_that_cannot_be_saved_has_no_key(pairs: Source) -> None:
    encoder = Encoder(tiny_tokenizer(), DataConfig())

    def save_pretrained(folder: str) -> None:
        raise NotImplementedError("no files")

    encoder.tokenizer._tokenizer.save_pretrained = save_pretrained
    with pytest.raises(NotCacheableError, match=r"tokenizer cannot be saved \(no files\)"):
        token_key(encoder, pairs)


def test_every_file_of_a_tokenizer_counts(pairs: Source) -> None:
    """With its name, in whatever order the disk lists them."""
    encoder = Encoder(tiny_tokenizer(), DataConfig())

    def key_with(files: dict[str, str]) -> str:
        def save_pretrained(folder: str) -> None:
            for name, text in files.items():
                Path(folder, name).parent.mkdir(exist_ok=True)
                Path(folder, name).write_text(text)

        encoder.tokenizer._tokenizer.save_pretrained = save_pretrained
        return token_key(encoder, pairs)

    versions = ({"a": "x"}, {"b": "x"}, {"a": "y"}, {"a": "x", "more/b": "y"})
    versions += ({"a": "x", "more/b": "z"}, {"a": "x", "b": "y", "c": "z"})
    assert len({key_with(files) for files in versions}) == len(versions)
    assert key_with({"c": "z", "b": "y", "a": "x"}) == key_with(versions[-1])


def test_code_that_comes_with_a_model_counts() -> None:
    """Classes of PACKAGES count by their version, all others by the file that defines them."""
    assert keys.code_sha256(dict) == ""
    assert keys.code_sha256(type(tiny_tokenizer())) == ""
    assert keys.code_sha256(Quarantined) == keys.file_sha256(
        Path(keys.__file__).with_name("pairs.py")
    )


# --- the rules that RULES stands for -------------------------------------------------------------

CASES = [
    *some_pairs(6),
    {"prompt": [user("q")], "chosen": [assistant("a b")], "rejected": [assistant("b\n")]},
    {k: [system("s"), user("q"), assistant(k)] for k in ("chosen", "rejected")},
    {"prompt": "the ", "chosen": "and", "rejected": "b " * 40},
    {"prompt": "q " * 60, "chosen": "a " * 30, "rejected": "b"},
    {"chosen": "It is so", "rejected": "It is not"},
    {"prompt": "q", "chosen": "a", "rejected": "a"},
    {"prompt": "q", "chosen": [assistant("a")], "rejected": "b"},
    {"prompt": "q\ud800", "chosen": "a", "rejected": "b"},
    {"prompt": [system("s"), user("q")], "chosen": [user("a")], "rejected": [assistant("b")]},
    {"prompt": "q " * 60, "chosen": "a " * 50, "rejected": "b " * 40},
    {
        "prompt": [user("q")],
        "chosen": [assistant("a", reasoning_content="because")],
        "rejected": [assistant("<think>\nso\n</think>\n\nb")],
    },
    {
        "prompt": [user("q")],
        "chosen": [assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}])],
        "rejected": [assistant("b")],
    },
    {
        "prompt": [user([{"type": "text", "text": "q"}])],
        "chosen": [assistant(["a", "b"])],
        "rejected": [assistant("b")],
    },
    {
        "prompt": [user("q")],
        "chosen": [assistant("a", tool_calls="f")],
        "rejected": [assistant("b")],
    },
    {
        "prompt": [user("q")],
        "chosen": [assistant("a<think>b</think>c")],
        "rejected": [assistant("<think>b")],
    },
]
THINKS = {"template_args": {"enable_thinking": True}}
CONFIGS: list[tuple[str | None, dict[str, Any]]] = [
    (CHATML, {}),
    (INST, {"max_length": 64, "max_prompt_length": 32}),
    (INST, {"compat": "official"}),
    (BARE, {"implicit_string_prompts": True}),
    (CHATML, {"chat_template": "none", "max_length": 64, "max_prompt_length": 32}),
    (TEMPLATES["qwen3"].text, THINKS),
    (TEMPLATES["qwen3"].text, {"score": "after_thinking", **THINKS}),
]
# What the rules of this number make of CASES: the hash of the tokens, and for each of CONFIGS the
# reasons of the quarantined records, by the line of each.
RECORDED_TOKENS = {4: "e01c94c4c26ecfb4c451a7dbeff919524fc1bd83b9eb3f0a1ae8f3276e151043"}
ALWAYS = {
    12: "identical responses",
    13: "mixes strings and messages",
    14: "invalid Unicode text",
    15: "does not end with an assistant turn",
    20: "tool calls are not a list of calls",
}
LOST = {21: "misplaced thinking"}
EMPTY = {18: "empty response"}  # without its tool call
RECORDED_REASONS = {
    4: [
        {11: "missing prompt", **ALWAYS, **EMPTY},
        {8: "rejected by the chat template", 11: "missing prompt", **ALWAYS, **EMPTY},
        {8: "rejected by the chat template", 11: "missing prompt", **ALWAYS},
        {**ALWAYS, **EMPTY},
        {11: "missing prompt", 12: "identical responses", 14: "invalid Unicode text"},
        {11: "missing prompt", **ALWAYS, **LOST},
        {11: "missing prompt", **ALWAYS, **LOST},
    ]
}


def outcomes(template: str | None, config: dict[str, Any]) -> tuple[list[Any], dict[int, str]]:
    """Return (encoded CASES as plain values, reason by line of the quarantined ones)."""
    encoded: list[Any] = []
    reasons: dict[int, str] = {}
    encoder = Encoder(tiny_tokenizer(template, bos="<s>"), DataConfig(**config))
    for number, case in enumerate(CASES):
        is_text = isinstance(case.get("prompt", ""), str) and isinstance(case["chosen"], str)
        if encoder.renderer.is_plain_text and not is_text:
            continue  # a conversation without a template is an error of the run, not of the record
        outcome = encode_row(encoder, Row(number, f"f:{number + 1}", case))
        if isinstance(outcome, Quarantined):
            assert outcome.source == f"f:{number + 1}"
            reasons[number + 1] = outcome.reason
            continue
        pair, prompt = outcome
        sequences = [[s.tokens.tolist(), s.score_start] for s in (pair.chosen, pair.rejected)]
        counts = [pair.boundary_tokens, pair.cut_prompt, pair.cut_response]
        counts += [pair.template_tokens, pair.dropped]
        encoded.append([pair.index, sequences, counts, prompt.decode()])
    return encoded, reasons


RAISE_RULES = "tokens or reasons changed: raise RULES in data/keys.py and record the new ones here"


def test_tokens_change_only_with_the_number_of_the_rules() -> None:
    """Otherwise a run would go on with tokens that earlier rules have cached on the user's disk."""
    encoded = [outcomes(template, config)[0] for template, config in CONFIGS]
    assert [len(pairs) for pairs in encoded] == [14, 13, 14, 15, 9, 14, 14]
    # Merged boundaries, cut prompts and responses, a template's own text and what it drops are all
    # among what is recorded.
    counts = [counts for pairs in encoded for _, _, counts, _ in pairs]
    assert all(any(column) for column in zip(*counts, strict=True))
    content_hash = hashlib.sha256(json.dumps(encoded).encode()).hexdigest()
    assert {RULES: content_hash} == RECORDED_TOKENS, RAISE_RULES


def test_reasons_change_only_with_the_number_of_the_rules() -> None:
    """Manifests of the cache hold them."""
    reasons = [outcomes(template, config)[1] for template, config in CONFIGS]
    assert {RULES: reasons} == RECORDED_REASONS, RAISE_RULES
