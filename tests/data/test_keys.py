"""The key changes with whatever can change a token or a message, and with nothing else."""

import datetime
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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
from mlx_simpo.data.keys import RULES, NoKeyError, token_key
from mlx_simpo.data.pairs import Quarantined
from mlx_simpo.data.sources import Row, Source, open_source
from mlx_simpo.data.tokenize import encode_row
from mlx_simpo.model.loading import load_only_tokenizer


def source(path: Path, **changes: Any) -> Source:
    return open_source(str(write_jsonl(path, [some_pairs(1)[0] | changes])))


@pytest.fixture
def pairs(tmp_path: Path) -> Source:
    return source(tmp_path / "pairs.jsonl")


def key(pairs: Source, tokenizer: Any = None, **config: Any) -> str:
    return token_key(Encoder(tokenizer or tiny_tokenizer(), DataConfig(**config)), pairs)


def test_the_same_again_has_the_same_key(pairs: Source) -> None:
    assert key(pairs) == key(open_source(pairs.name))
    assert len(key(pairs)) == 32


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 1000},
        {"max_prompt_length": 500},
        {"implicit_string_prompts": True},
        {"chat_template": "none"},
        {"chat_template": CHATML + " "},
    ],
)
def test_settings_that_decide_tokens(pairs: Source, changed: dict[str, Any]) -> None:
    assert key(pairs, **changed) != key(pairs)


def test_the_authors_rules_are_others(pairs: Source) -> None:
    tokenizer = tiny_tokenizer(INST, bos="<s>")
    assert key(pairs, tokenizer, compat="official") != key(pairs, tokenizer)


@pytest.mark.parametrize(
    "ignored", [{"max_quarantined": 0.5}, {"valid_fraction": 0.2}, {"chat_template": CHATML}]
)
def test_settings_that_do_not(pairs: Source, ignored: dict[str, Any]) -> None:
    assert key(pairs, **ignored) == key(pairs)


def test_a_template_file_counts_by_its_text(pairs: Source, tmp_path: Path) -> None:
    found = set()
    for name, text in (("a", BARE), ("b", BARE), ("a", BARE + " ")):
        (tmp_path / name).write_text(text)
        found.add(key(pairs, chat_template=str(tmp_path / name)))
    assert len(found) == 2


def changed_tokenizers() -> dict[str, Any]:
    with_token, ends, unstripped = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    with_token._tokenizer.add_tokens(["<new>"])
    ends.add_eos_token("a")  # as generation configs do
    unstripped._tokenizer.backend_tokenizer.pre_tokenizer = None
    return {
        "template": tiny_tokenizer(BARE),
        "no template": tiny_tokenizer(None),
        "bos": tiny_tokenizer(bos="<s>"),
        "adds bos": tiny_tokenizer(bos="<s>", adds_bos=True),
        "token": with_token,
        "end of turn": ends,
        "pre-tokenizer": unstripped,
    }


def test_everything_in_the_tokenizer_counts(pairs: Source) -> None:
    found = {name: key(pairs, tokenizer) for name, tokenizer in changed_tokenizers().items()}
    assert len({*found.values(), key(pairs)}) == len(found) + 1


def test_the_tokenizers_class_counts(pairs: Source) -> None:
    class Other(type(tiny_tokenizer())):
        pass

    tokenizer = tiny_tokenizer()
    before = key(pairs, tokenizer)
    tokenizer.__class__ = Other
    assert key(pairs, tokenizer) != before


def test_a_tokenizer_elsewhere_is_the_same_one(
    model_folder: Path, pairs: Source, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "copy")
    first, second = (load_only_tokenizer(str(f)) for f in (model_folder, tmp_path / "copy"))
    assert key(pairs, first) == key(pairs, second)


def test_a_use_of_the_tokenizer_changes_nothing(pairs: Source) -> None:
    coder = Encoder(tiny_tokenizer(), DataConfig())
    before = token_key(coder, pairs)
    for row in pairs.rows():
        encode_row(coder, row)
    assert token_key(coder, pairs) == before


def test_the_data_counts_by_content_and_by_the_name_in_messages(tmp_path: Path) -> None:
    one = key(source(tmp_path / "a.jsonl"))
    assert one == key(source(tmp_path / "a.jsonl"))  # written anew
    others = {
        key(source(tmp_path / "b.jsonl")),
        key(source(tmp_path / "a.jsonl", prompt="another")),
        key(source(tmp_path / "a.jsonl", extra=1)),
    }
    assert len({one, *others}) == 4


def test_each_file_of_a_folder_counts(tmp_path: Path) -> None:
    found = set()
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write_jsonl(tmp_path / name, some_pairs(2))
        found.add(key(open_source(str(tmp_path))))
    write_jsonl(tmp_path / "b.jsonl", some_pairs(3))
    assert len({*found, key(open_source(str(tmp_path)))}) == 4


def test_a_template_with_the_date_has_a_key_a_day(
    pairs: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = CHATML.replace("Be kind.", "Today is {{ strftime_now('%d %b %Y') }}.")

    def keys_on(day: int) -> tuple[str, ...]:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime.datetime:
                return datetime.datetime(2026, 1, day, 12)

        monkeypatch.setattr(keys, "datetime", Clock)
        own = tiny_tokenizer(dated)
        return key(pairs, own), key(pairs, chat_template=dated), key(pairs)

    first, second = keys_on(1), keys_on(2)
    assert [a == b for a, b in zip(first, second, strict=True)] == [False, False, True]
    assert first == keys_on(1)


@pytest.mark.parametrize("name", ["FORMAT", "RULES"])
def test_a_new_version_is_a_new_key(
    pairs: Source, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = key(pairs)
    monkeypatch.setattr(keys, name, 1000)
    assert key(pairs) != before


def test_versions_of_the_packages_count(pairs: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(pairs)
    monkeypatch.setattr(keys, "version", lambda name: "9" if name == "tokenizers" else None)
    assert key(pairs) != before


def test_data_in_memory_has_no_key(pairs: Source) -> None:
    with pytest.raises(NoKeyError, match="no files that would tell when it changes"):
        key(replace(pairs, files=()))


def test_a_tokenizer_that_cannot_be_written_has_no_key(pairs: Source) -> None:
    coder = Encoder(tiny_tokenizer(), DataConfig())

    def refuse(folder: str) -> None:
        raise NotImplementedError("no files")

    coder.tokenizer._tokenizer.save_pretrained = refuse
    with pytest.raises(NoKeyError, match=r"cannot be written to files \(no files\)"):
        token_key(coder, pairs)


def test_code_that_comes_with_a_model_counts(tmp_path: Path) -> None:
    """Classes of other packages count by their file, those of the packages by their version."""
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
]
WAYS: list[tuple[str | None, dict[str, Any]]] = [
    (CHATML, {}),
    (INST, {"max_length": 64, "max_prompt_length": 32}),
    (INST, {"compat": "official"}),
    (BARE, {"implicit_string_prompts": True}),
    (CHATML, {"chat_template": "none", "max_length": 64, "max_prompt_length": 32}),
]
# The hash of what the rules of this number make of CASES.
RECORDED = {1: "4b9a699fa6c1e2a65c8a18ccec0cdafb054d1cbc7617a4e66a651db27fd6eb51"}


def outcomes() -> list[Any]:
    """What becomes of CASES, in plain values."""
    found: list[Any] = []
    for template, config in WAYS:
        coder = Encoder(tiny_tokenizer(template, bos="<s>"), DataConfig(**config))
        strings = [isinstance(case.get("prompt", ""), str) for case in CASES]
        for number, (case, is_text) in enumerate(zip(CASES, strings, strict=True)):
            if coder.renderer.plain and not (is_text and isinstance(case["chosen"], str)):
                continue  # a conversation without a template is no row's defect
            outcome = encode_row(coder, Row(number, f"f:{number + 1}", case))
            if isinstance(outcome, Quarantined):
                found.append([outcome.source, outcome.reason])
                continue
            pair, prompt = outcome
            sides = [[s.tokens.tolist(), s.score_start] for s in (pair.chosen, pair.rejected)]
            found.append(
                [*sides, pair.boundary_tokens, pair.cut_prompt, pair.cut_response, prompt.decode()]
            )
    return found


def test_the_rules_are_those_of_their_number() -> None:
    """If this fails on purpose, raise RULES in data/keys.py and record the hash under its number:
    what users have kept on disk was made by the rules before."""
    found = hashlib.sha256(json.dumps(outcomes()).encode()).hexdigest()
    assert {RULES: found} == RECORDED
