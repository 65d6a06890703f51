"""What a run reads: sources, samples of them, a folder with splits, rows from memory."""

from pathlib import Path
from typing import Any

import pytest
from helpers.commands import captured_display
from helpers.settings import error_of
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import DataConfig, SimPOConfig, SourceConfig
from mlx_simpo.training import datasets
from mlx_simpo.training.datasets import read_pairs
from mlx_simpo.training.inputs import open_dataset, open_train, open_valid

ROWS = some_pairs(4)


class Opened:
    """What is opened with these settings and rows: the number of records per name, and notes."""

    def __init__(self, settings: dict[str, Any], train: Any = None, valid: Any = None) -> None:
        display, text = captured_display()
        display.console.width = 1000
        config = SimPOConfig(model="m", data=DataConfig(**settings))
        self.train = open_train(config, train, display)
        self.valid = open_valid(config, valid, display)
        self.text = text.getvalue()

    @property
    def sizes(self) -> tuple[dict[str, int], dict[str, int]]:
        train, valid = (
            {name: len(list(source.rows())) for name, source in sources.items()}
            for sources in (self.train.sources, self.valid)
        )
        return train, valid


def files(folder: Path, **sizes: int) -> dict[str, str]:
    """Write NAME.jsonl with so many pairs for each name; return their paths."""
    folder.mkdir(exist_ok=True)
    return {n: str(write_jsonl(folder / f"{n}.jsonl", some_pairs(k))) for n, k in sizes.items()}


# --- sources ---------------------------------------------------------------------------------


def test_sources_and_sets_have_their_names(tmp_path: Path) -> None:
    paths = files(tmp_path, a=5, b=4, c=3)
    train = [paths["a"], SourceConfig(paths["b"], name="code")]
    data = Opened({"train": train, "valid": {"chat": paths["c"], "safety": {"path": paths["a"]}}})
    assert data.sizes == ({"a": 5, "code": 4}, {"chat": 3, "safety": 5})
    assert data.train.weights is None


@pytest.mark.parametrize("form", ["path", "source", "named"])
def test_every_form_of_validation_sets(form: str, tmp_path: Path) -> None:
    path = files(tmp_path, c=3)["c"]
    valid = {"path": path, "source": SourceConfig(path), "named": {"c": path}}[form]
    assert Opened({"valid": valid}, ROWS).sizes[1] == {"c" if form == "named" else "": 3}


def test_weights_are_those_of_the_sources(tmp_path: Path) -> None:
    paths = files(tmp_path, a=5, b=4)
    train = [{"path": paths["a"], "weight": 2}, {"path": paths["b"], "weight": 0.5}]
    assert Opened({"train": train}).train.weights == (2.0, 0.5)


def test_a_sample_is_taken_of_each_training_source_and_is_told(tmp_path: Path) -> None:
    paths = files(tmp_path, a=50, b=40, c=3, d=60)
    train = [paths["a"], {"path": paths["b"], "max_samples": 7}, paths["c"]]
    data = Opened({"train": train, "valid": paths["d"], "max_samples": 20})
    assert data.sizes == ({"a": 20, "b": 7, "c": 3}, {"": 60})
    assert data.text.splitlines() == [
        f"using 20 of 50 records of {paths['a']} (max_samples)",
        f"using 7 of 40 records of {paths['b']} (max_samples)",
        f"{paths['c']} has 3 records, all of which are used (max_samples=20)",
    ]


def test_a_validation_set_has_a_sample_if_it_asks_for_one(tmp_path: Path) -> None:
    paths = files(tmp_path, a=50)
    valid = {"chat": {"path": paths["a"], "max_samples": 6}}
    assert Opened({"valid": valid, "max_samples": 2}, ROWS).sizes == ({"train": 2}, {"chat": 6})


def test_everything_is_opened_before_the_tokenizer_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_only_tokenizer", lambda *a, **k: pytest.fail("it is"))
    path = files(tmp_path, a=5)["a"]
    for valid in (str(tmp_path / "no"), {"chat": path, "safety": str(tmp_path / "no")}):
        data: Any = {"train": path, "valid": valid}
        config = SimPOConfig(model="nobody/nothing", data=DataConfig(**data))
        display = captured_display()[0]
        message = error_of(lambda c=config, d=display: read_pairs(c, None, None, d))
        assert "no such file, folder or dataset: " in message


# --- data.subset -----------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["train", "valid"])
def test_a_subset_of_local_data_is_an_error(pairs_file: Path, setting: str) -> None:
    names: dict[str, Any] = {"train": str(pairs_file), setting: str(pairs_file)}
    config = SimPOConfig(model="m", data=DataConfig(**names, subset="some"))
    source = SourceConfig(str(pairs_file))
    message = error_of(lambda: open_dataset(config, source, captured_display()[0]))
    assert message.startswith(f"data.subset is 'some', but {pairs_file} is local")


@pytest.mark.parametrize(
    ("train_from", "is_used"),
    [("owner/name", True), ("FILE", False), (None, False), (["FILE", "owner/name"], True)],
)
def test_a_subset_of_a_hub_dataset_does_not_concern_a_local_file_beside_it(
    pairs_file: Path, train_from: Any, is_used: bool
) -> None:
    """But a subset that belongs to no dataset is an error, and never ignored."""
    if isinstance(train_from, list):
        train_from = [str(pairs_file) if name == "FILE" else name for name in train_from]
    train_from = str(pairs_file) if train_from == "FILE" else train_from
    data = DataConfig(train=train_from, valid=str(pairs_file), subset="some")
    config, source = SimPOConfig(model="m", data=data), SourceConfig(str(pairs_file))
    if is_used:
        assert open_dataset(config, source, captured_display()[0]).count() == 12
    else:
        message = error_of(lambda: open_dataset(config, source, captured_display()[0]))
        assert message.startswith("data.subset is 'some'")


def test_a_subset_that_every_hub_dataset_overrides_is_an_error() -> None:
    source = SourceConfig("owner/name", subset="own")
    config = SimPOConfig(model="m", data=DataConfig(train=(source,), subset="some"))
    assert error_of(lambda: open_dataset(config, source, captured_display()[0])) == (
        "data.subset is 'some', but owner/name has a subset of its own; remove data.subset"
    )


# --- data.folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev"])
def test_a_folder_has_training_and_validation_files(name: str, tmp_path: Path) -> None:
    files(tmp_path, train=5, test=4, **{name: 3})
    assert Opened({"folder": str(tmp_path)}).sizes == ({tmp_path.name.split(".")[0]: 5}, {"": 3})
    assert Opened({"folder": str(tmp_path), "valid_split": "test"}).sizes[1] == {"": 4}


def test_a_folder_may_have_folders_of_its_splits(tmp_path: Path) -> None:
    files(tmp_path / "train", part=5)
    files(tmp_path / "validation", part=3)
    sizes = Opened({"folder": str(tmp_path)}).sizes
    assert [list(counts.values()) for counts in sizes] == [[5], [3]]


def test_a_folder_without_a_validation_file_has_no_set(tmp_path: Path) -> None:
    files(tmp_path, train=5, test=4)
    assert Opened({"folder": str(tmp_path)}).valid == {}


def test_a_folder_without_a_training_file_is_an_error_that_has_what_is_there(
    tmp_path: Path,
) -> None:
    files(tmp_path, learn=5, valid=4)
    message = error_of(lambda: Opened({"folder": str(tmp_path)}))
    assert (
        message == f"{tmp_path} has no files of the split 'train'; it has learn.jsonl, valid.jsonl"
    )


def test_two_validation_files_are_an_error(tmp_path: Path) -> None:
    files(tmp_path, train=5, dev=3, valid=4)
    assert error_of(lambda: Opened({"folder": str(tmp_path)})) == (
        f"data.folder is '{tmp_path}', which has the splits dev and valid; say which one to "
        "evaluate on: data.valid_split=dev"
    )
    assert Opened({"folder": str(tmp_path), "valid_split": "valid"}).sizes[1] == {"": 4}


@pytest.mark.parametrize(
    ("folder", "hint"),
    [("nowhere", ""), ("owner/name", "; for a Hub dataset, set data.train=owner/name")],
)
def test_a_folder_must_be_one(folder: str, hint: str) -> None:
    assert error_of(lambda: Opened({"folder": folder})) == (
        f"data.folder is {folder!r}, which is no folder; it must be one with train.jsonl and "
        f"valid.jsonl{hint}"
    )


def test_a_folder_with_several_splits_as_training_data_names_the_setting(tmp_path: Path) -> None:
    files(tmp_path, train=5, valid=4)
    message = error_of(lambda: Opened({"train": str(tmp_path)}))
    assert "holds several splits (train, valid); name one, e.g. data.train_split=train" in message
    assert "--split train for other commands" in message
    assert message.endswith(f"or set data.folder={tmp_path} instead of data.train and data.valid")


# --- rows ------------------------------------------------------------------------------------


def test_rows_take_the_place_of_the_settings() -> None:
    assert Opened({}, ROWS, ROWS[:2]).sizes == ({"train": 4}, {"": 2})
    named = {"chat": ROWS[:1], "safety": ROWS[:3]}
    assert Opened({}, ROWS, named).sizes[1] == {"chat": 1, "safety": 3}


def test_rows_of_the_training_alone_leave_the_others_to_the_settings(tmp_path: Path) -> None:
    paths = files(tmp_path, a=5, b=4)
    assert Opened({"valid": paths["a"]}, ROWS).sizes == ({"train": 4}, {"": 5})
    assert Opened({"train": paths["b"]}, None, ROWS).sizes == ({"b": 4}, {"": 4})


def test_a_sample_is_taken_of_rows_too() -> None:
    data = Opened({"max_samples": 3}, some_pairs(30))
    assert data.sizes[0] == {"train": 3}
    assert data.text == "using 3 of 30 records of train (max_samples)\n"


@pytest.mark.parametrize(
    ("argument", "setting", "value"),
    [
        ("train", "train", "pairs.jsonl"),
        ("train", "folder", "pairs"),
        ("train", "train_split", "train"),
        ("valid", "valid", "pairs.jsonl"),
        ("valid", "folder", "pairs"),
    ],
)
def test_rows_and_settings_for_the_same_are_an_error(
    argument: str, setting: str, value: str
) -> None:
    rows = {"train": ROWS, argument: ROWS} if setting != "folder" else {argument: ROWS}
    config = SimPOConfig(model="m", data=DataConfig(**{setting: value}))  # type: ignore[arg-type]
    open_it = open_train if argument == "train" else open_valid
    assert error_of(lambda: open_it(config, rows[argument], captured_display()[0])) == (
        f"{argument} has rows from memory, but data.{setting} is {value!r}; set data.{setting} to "
        f"null, or leave {argument}=… away"
    )


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", 3])
def test_names_of_validation_rows_are_checked(name: Any) -> None:
    message = error_of(lambda: Opened({}, ROWS, {"chat": ROWS, name: ROWS}))
    assert message.startswith(f"valid is a mapping with the name {name!r}; several validation sets")
    assert "need names of letters, digits, - and _: {'chat': rows" in message


def test_no_training_data_is_an_error_that_names_the_ways() -> None:
    assert error_of(lambda: Opened({})) == (
        "data.train is missing; name a file, a folder or a Hugging Face dataset, or pass rows from "
        "memory: train(config, train=rows)"
    )


@pytest.mark.parametrize("several", [False, True])
def test_validation_rows_have_the_columns_of_the_settings(several: bool) -> None:
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    rows = [{ours: row[name] for name, ours in columns.items()} for row in ROWS]
    opened = Opened({"columns": columns}, valid={"chat": rows} if several else rows, train=rows)
    for source in (*opened.train.sources.values(), *opened.valid.values()):
        assert [row.value for row in source.rows()] == ROWS


def test_which_records_are_drawn_depends_on_the_seed_of_the_run() -> None:
    def drawn(seed: int) -> list[int]:
        config = SimPOConfig(model="m", data=DataConfig(max_samples=6), seed=seed)
        opened = open_train(config, some_pairs(12), captured_display()[0])
        return [row.number for row in opened.sources["train"].rows()]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 2
