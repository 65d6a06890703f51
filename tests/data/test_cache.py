"""Tokens that are kept are those that would be made, or they are made anew; never half a folder."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import BARE, some_pairs, tiny_tokenizer, write_jsonl

from mlx_simpo import DataConfig, SimPOError, load_pairs
from mlx_simpo.data import cache
from mlx_simpo.data.cache import Tokenized, read_folder, tokenized, tokens_folder
from mlx_simpo.data.encode import Encoder, encode_pairs
from mlx_simpo.data.pairs import Quarantined
from mlx_simpo.data.sources import open_hub, open_source
from mlx_simpo.data.tokens import FILES

BAD = {"prompt": "q\ud800", "chosen": "", "rejected": "b"}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_SIMPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows: list[Any] = [*some_pairs(20), BAD, *some_pairs(5)]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


class Bar:
    """A progress bar that remembers."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    @contextmanager
    def __call__(self, total: int) -> Iterator[Callable[[int], None]]:
        self.total = total

        def advance(rows: int) -> None:
            self.done += rows

        yield advance


def made(data: Path, bar: Bar | None = None, **config: Any) -> Tokenized:
    coder = Encoder(tiny_tokenizer(), DataConfig(**config))
    return tokenized(coder, open_source(str(data)), bar or Bar())


def plain(found: Tokenized) -> list[tuple]:
    return [
        (
            p.chosen.tokens.tolist(),
            p.rejected.tokens.tolist(),
            p.chosen.score_start,
            p.index,
            p.source,
        )
        for p in found.pairs
    ]


def expected(data: Path, **config: Any) -> list[tuple]:
    """By encoding one pair after the other, without files."""
    coder = Encoder(tiny_tokenizer(), DataConfig(**config))
    pairs, _ = encode_pairs(coder, load_pairs(str(data)).pairs)
    return [
        (
            p.chosen.tokens.tolist(),
            p.rejected.tokens.tolist(),
            p.chosen.score_start,
            p.index,
            p.source,
        )
        for p in pairs
    ]


def folders(root: Path) -> list[Path]:
    return sorted(root.iterdir())


# --- kept and found again --------------------------------------------------------------------


def test_the_second_time_they_come_from_the_folder(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Bar()
    first = made(data, bar)
    assert (bar.total, bar.done) == (26, 26)
    (folder,) = folders(root)
    assert re.search(rf"kept for the next run in {folder} \(0\.\d MB; 0\.\d MB in all", first.note)
    monkeypatch.setattr(cache, "write_tokens", lambda *a: pytest.fail("was tokenized again"))
    second = made(data)
    assert second.note == f"tokens are those kept in {folder}"
    assert plain(first) == plain(second) == expected(data)
    assert list(first.pairs.prompts()) == list(second.pairs.prompts())
    assert first.quarantined == second.quarantined
    assert first.quarantined == [Quarantined(f"{data}:21", "empty answer", "chosen")]
    assert first.warnings == second.warnings == []


def test_other_settings_are_kept_beside(data: Path, root: Path) -> None:
    ways: list[dict[str, Any]] = [{}, {"chat_template": BARE}, {"max_length": 40}]
    ways[2]["max_prompt_length"] = 30
    for _ in range(2):
        for config in ways:
            assert plain(made(data, **config)) == expected(data, **config)
    assert len(folders(root)) == 3


def test_changed_data_is_other_data(data: Path, root: Path) -> None:
    made(data)
    with data.open("a") as lines:
        lines.write(json.dumps(some_pairs(1)[0]) + "\n")
    assert len(made(data).pairs) == 26
    write_jsonl(data, some_pairs(3))
    assert plain(made(data)) == expected(data)
    assert len(folders(root)) == 3


def test_what_has_no_key_is_made_each_time_and_says_so(data: Path, root: Path) -> None:
    coder, source = Encoder(tiny_tokenizer(), DataConfig()), open_source(str(data))
    for _ in range(2):
        found = tokenized(coder, replace(source, files=()), Bar())
        assert plain(found) == expected(data)
        assert re.match(r"tokens are not kept for the next run: .* has no files", found.note)
        assert folders(root) == []


def test_a_hub_data_set_is_kept_by_the_files_that_were_made_of_it(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    file = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    coder, notes = Encoder(tiny_tokenizer(), DataConfig()), []
    for count in (3, 3, 4):  # the second time the same, then a new commit of the data set
        pq.write_table(pa.Table.from_pylist(some_pairs(count)), file)
        found = tokenized(coder, open_hub(str(tmp_path / "set"), "train", None), Bar())
        assert [pair.index for pair in found.pairs] == list(range(count))
        notes.append(found.note.partition(" in ")[0])
    kept = "tokens are kept for the next run"
    assert notes == [kept, "tokens are those kept", kept]
    assert len(folders(root)) == 2


def test_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    for variables, folder in (
        ({"MLX_SIMPO_CACHE": "/m", "XDG_CACHE_HOME": "/x"}, "/m/tokens"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/mlx_simpo/tokens"),
        ({"MLX_SIMPO_CACHE": ""}, "/h/.cache/mlx_simpo/tokens"),
    ):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("MLX_SIMPO_CACHE", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(tokens_folder()) == folder


def test_the_prompts_are_for_the_user_alone(data: Path, root: Path) -> None:
    made(data)
    assert folders(root)[0].stat().st_mode & 0o077 == 0


# --- damaged ---------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", [cut, grow, flip, empty, Path.unlink])
def test_a_damaged_folder_is_made_anew_with_a_warning(
    data: Path, root: Path, name: str, damage: Callable[[Path], None]
) -> None:
    made(data)
    (folder,) = folders(root)
    damage(folder / name)
    found = made(data)
    (warning,) = found.warnings
    assert warning.startswith(f"the tokens kept in {folder} are made anew: ")
    assert plain(found) == expected(data)
    assert folders(root) == [folder]
    again = made(data)
    assert (again.warnings, plain(again)) == ([], expected(data))


def test_pairs_in_use_outlive_the_folder(data: Path, root: Path) -> None:
    found = made(data)
    cache.remove(folders(root)[0])
    assert folders(root) == []
    assert plain(found) == expected(data)


# --- interrupted, no room, two at once -------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SimPOError("no template"), MemoryError])
def test_an_interrupted_run_leaves_nothing(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    honest = Encoder.encode

    def encode(self: Encoder, pair: Any) -> Any:
        if pair.index == 15:
            raise error
        return honest(self, pair)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", encode)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            made(data)
    assert folders(root) == []
    assert plain(made(data)) == expected(data)


@pytest.mark.parametrize("place", ["write_tokens", "write_manifest"])
def test_a_full_disk_is_told_and_leaves_nothing(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, place, full)
    with pytest.raises(SimPOError, match=r"cannot keep .*No space left.*MLX_SIMPO_CACHE"):
        made(data)
    assert folders(root) == []


def test_a_cache_that_cannot_be(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_SIMPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(SimPOError, match="name another folder in the environment variable"):
        made(data)


def test_data_that_changes_meanwhile_is_refused(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = cache.write_tokens

    def changing(*arguments: Any) -> Any:
        with data.open("a") as lines:
            lines.write(json.dumps(some_pairs(1)[0]) + "\n")
        return honest(*arguments)

    monkeypatch.setattr(cache, "write_tokens", changing)
    with pytest.raises(SimPOError, match="was changed while it was read"):
        made(data)
    assert folders(root) == []


def test_another_run_may_be_faster(data: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, done = cache.write_manifest, []

    def overtaken(*arguments: Any) -> None:
        honest(*arguments)
        if not done:
            done.append(True)
            assert plain(made(data)) == expected(data)

    monkeypatch.setattr(cache, "write_manifest", overtaken)
    assert plain(made(data)) == expected(data)
    assert len(folders(root)) == 1
    assert plain(read_folder(folders(root)[0])) == expected(data)


def test_folders_of_other_runs_may_vanish_at_any_time(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look into the cache's folder and the look into one of those in it."""
    made(data, chat_template="none")
    (other,) = folders(root)
    honest = Path.iterdir

    def with_ghosts(folder: Path) -> Iterator[Path]:
        yield from honest(folder)
        if folder == root:
            yield from (root / "unfinished-gone", root / ("0" * 32), root / "unfinished-file")

    monkeypatch.setattr(Path, "iterdir", with_ghosts)
    assert plain(made(data)) == expected(data)
    monkeypatch.undo()
    assert other in honest(root)


PROGRAM = """
import sys
from contextlib import nullcontext
sys.path.insert(0, {tests!r})
from helpers.tiny import tiny_tokenizer
from mlx_simpo import DataConfig
from mlx_simpo.data.cache import tokenized
from mlx_simpo.data.encode import Encoder
from mlx_simpo.data.sources import open_hub, open_source
made = tokenized(
    Encoder(tiny_tokenizer(), DataConfig()), open_source({data!r}),
    lambda total: nullcontext(lambda rows: None),
)
print(sum(int(p.chosen.tokens.sum()) for p in made.pairs), len(made.pairs), made.warnings)
"""


def test_two_processes_at_once(tmp_path: Path, root: Path) -> None:
    data = write_jsonl(tmp_path / "many.jsonl", some_pairs(1500))
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), data=str(data))
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate()[0] for process in both]
    total = sum(sum(tokens) for tokens, *_ in expected(data))
    assert results == [f"{total} 1500 []\n"] * 2
    assert plain(read_folder(*folders(root))) == expected(data)


# --- what is deleted -------------------------------------------------------------------------


def age(folder: Path, days: float) -> None:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - days * 24 * 3600,) * 2)


def test_what_is_not_used_for_long_is_deleted_and_nothing_else(data: Path, root: Path) -> None:
    made(data)
    (old,) = folders(root)
    made(data, chat_template="none")
    (recent,) = set(folders(root)) - {old}
    for name, days in (("unfinished-old", 2), ("unfinished-new", 0.5), ("the user's own", 400)):
        (root / name).mkdir()
        (root / name / "tokens.bin").touch()
        age(root / name, days)
    age(old, 31)
    age(recent, 29)
    cache.sweep(root)
    names = {"unfinished-new", "the user's own", recent.name}
    assert {folder.name for folder in folders(root)} == names


def test_a_use_keeps_it(data: Path, root: Path) -> None:
    made(data)
    (folder,) = folders(root)
    age(folder, 40)
    made(data)
    cache.sweep(root)
    assert folders(root) == [folder]
