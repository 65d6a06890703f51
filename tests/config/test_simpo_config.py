"""The whole configuration: from YAML, overrides and Python, and back to YAML."""

import json
import typing
from dataclasses import fields, is_dataclass, replace
from functools import partial, reduce
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from helpers.settings import SECTIONS, SETTINGS, error_of, kind, write_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_simpo import DataConfig, LoRAConfig, SimPOConfig, SimPOError, TrainConfig, load_config
from mlx_simpo.config.simpo_config import resume_config
from mlx_simpo.config.sources import SourceConfig, default_name
from mlx_simpo.config.yaml import dump_inline
from mlx_simpo.errors import InvalidSettingsError


def test_a_section_as_a_dict_in_python_is_an_error() -> None:
    message = error_of(lambda: SimPOConfig(model="x", lora={"rank": 4}))  # type: ignore[arg-type]
    assert message == "lora is {'rank': 4}; it must be LoRAConfig"


def texts(**limits: int) -> st.SearchStrategy[str]:
    """Any text but U+0085: test_a_rare_line_break_reads_back."""
    return st.text(st.characters(exclude_characters="\x85", codec="utf-8"), max_size=8, **limits)


def numbers(rule: str) -> st.SearchStrategy[float]:
    low, high, open_low, open_high = {
        "greater than 0": (0, None, True, False),
        "0 or greater": (0, None, False, False),
        "at least 0 and less than 1": (0, 1, False, True),
        "between 0 and 1": (0, 1, False, False),
        "at least 0 and less than 0.5": (0, 0.5, False, True),
    }[rule]
    return st.floats(
        low,
        high,
        exclude_min=open_low,
        exclude_max=open_high,
        allow_nan=False,
        allow_infinity=False,
    )


# Not "path", with which a mapping is one source and not several by name.
NAMES = st.from_regex("[A-Za-z0-9_-]{1,8}", fullmatch=True).filter(lambda name: name != "path")


def anything() -> st.SearchStrategy:
    """Any value that YAML can hold."""
    scalars = st.none() | st.booleans() | st.integers() | numbers("0 or greater") | texts()
    return st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(texts(), v), max_leaves=4)


@st.composite
def sources(draw: st.DrawFn, *, weighted: bool = False, may_have_name: bool = True) -> SourceConfig:
    """Any source; one of validation pairs has no name."""
    optional = st.none() | texts(min_size=1)
    columns = st.none() | st.dictionaries(texts(), texts(), max_size=2)
    return SourceConfig(
        draw(texts(min_size=1)),
        name=draw(st.none() | NAMES) if may_have_name else None,
        split=draw(optional),
        subset=draw(optional),
        columns=draw(columns),
        max_samples=draw(st.none() | st.integers(1)),
        weight=draw(numbers("greater than 0")) if weighted else None,
    )


def have_names_of_their_own(listed: list[SourceConfig]) -> bool:
    names = [source.name or default_name(source.path) for source in listed]
    return len(names) > 0 and len(set(names)) == len(names)


def value_of(name: str) -> st.SearchStrategy:
    """Values that are valid for one setting, whatever the others are."""
    item, hint = SETTINGS[name]
    what, may_be_null = kind(hint)
    rule = item.metadata["rule"].text if item.metadata["rule"] else ""
    if what == "int":
        least = {"greater than 0": 1, "2 or greater": 2, "0 or greater": 0}.get(rule, 1)
        values = st.integers(least, 2**32 - 1 if name == "seed" else 2**53)
    elif what == "float":
        values = numbers(rule)
    elif what == "bool":
        values = st.booleans()
    elif what == "choice":
        choice = next((p for p in typing.get_args(hint) if typing.get_args(p)), hint)
        values = st.sampled_from(typing.get_args(choice))
    elif what == "names":
        values = st.lists(texts(), min_size=1).map(tuple)
        values = st.just("all-linear") | values if name == "lora.target_modules" else values
    elif what == "texts":
        values = st.lists(texts()).map(tuple)
    elif what == "texts by name":
        values = st.dictionaries(texts(min_size=1), texts(), min_size=1, max_size=3)
    elif what == "values by name":
        values = st.dictionaries(texts(min_size=1), anything(), min_size=1, max_size=3)
    elif what == "sources":
        lists = st.booleans().flatmap(lambda weighted: st.lists(sources(weighted=weighted)))
        values = texts(min_size=1) | sources() | lists.filter(have_names_of_their_own).map(tuple)
    elif what == "sources by name":
        source = sources(may_have_name=False)
        sets = st.dictionaries(NAMES, source, min_size=1, max_size=3)
        values = texts(min_size=1) | source | sets
    else:
        values = texts(min_size=1 if rule else 0)
    return st.none() | values if may_be_null else values


@st.composite
def configs(draw: st.DrawFn) -> SimPOConfig:
    """Any configuration that is valid."""
    drawn = {name: draw(value_of(name), label=name) for name in SETTINGS}
    drawn["data.max_length"] = max(2, drawn["data.max_length"])
    drawn["data.max_prompt_length"] = draw(st.integers(1, drawn["data.max_length"] - 1))
    if drawn["data.folder"] is not None:
        drawn |= dict.fromkeys(["data.train", "data.valid", "data.train_split"])
    if drawn["data.valid"] is None:
        drawn["data.valid_split"] = None
    sets = drawn["data.valid"] if isinstance(drawn["data.valid"], dict) else {}
    drawn["data.valid_main"] = draw(st.sampled_from([None, *sets]))
    if drawn["data.compat"]:
        drawn["data.chat_template"], drawn["data.score"] = "auto", "all"
    if drawn["objective.loss_type"] == "hinge":
        drawn["objective.label_smoothing"] = 0.0
    if drawn["lora.scale"] is not None:
        drawn["lora.lora_alpha"], drawn["lora.rslora"] = None, False
    if drawn["train.steps"] is not None:
        drawn["train.epochs"] = None
    if drawn["train.engine"] == "shared_prefix" and drawn["train.compile"]:
        drawn["train.compile"] = None
    if drawn["train.early_stopping.patience"] is None:
        drawn["train.early_stopping.metric"] = "loss"
        drawn["train.early_stopping.min_delta"] = 0.0
    elif drawn["train.eval_every"] is None:
        drawn["train.eval_every"] = 1
    if drawn["train.engine"] == "reference":
        drawn["logps.impl"] = drawn["engine.attention"] = "auto"
    groups: dict[str, dict] = {"": {}, **{section: {} for section in SECTIONS}}
    for name, value in drawn.items():
        section, _, leaf = name.rpartition(".")
        groups[section][leaf] = value
    # The deepest sections first: they are settings of those around them.
    for name in sorted(SECTIONS, key=lambda name: -name.count(".")):
        section, _, leaf = name.rpartition(".")
        groups[section][leaf] = SECTIONS[name](**groups[name])
    return SimPOConfig(**groups[""])


@given(config=configs())
@settings(deadline=None, max_examples=50)
def test_yaml_reads_back_to_an_equal_configuration(
    config: SimPOConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config


@given(config=configs())
@settings(deadline=None, max_examples=30)
def test_overrides_mean_the_same_as_yaml(config: SimPOConfig) -> None:
    overrides = []
    for name, (_, hint) in SETTINGS.items():
        value = attrgetter(name)(config)
        assume(value != "null" or not kind(hint)[1])  # the word would be the value null
        if kind(hint)[0] in ("names", "sources", "sources by name") and isinstance(value, str):
            assume(value[:1] not in ("[", "{"))  # a list or a mapping
        plain = reduce(dict.__getitem__, name.split("."), config.as_dict())
        overrides.append(f"{name}={value if isinstance(value, str) else dump_inline(plain)}")
    assert load_config(None, overrides) == config


def test_the_defaults_read_back() -> None:
    text = SimPOConfig(model="x").to_yaml()
    assert text.startswith("model: x\n")
    assert "\n  rank: 16\n" in text


def test_a_source_is_written_with_what_is_set() -> None:
    train = [{"path": "a"}, {"path": "b", "columns": {"prompt": "q"}, "max_samples": 2}]
    config = load_config({"model": "x", "data": {"train": train}})
    assert config.as_dict()["data"]["train"] == train
    config = SimPOConfig(model="x", data=DataConfig(valid={"b": SourceConfig("c", split="d")}))
    assert config.as_dict()["data"]["valid"] == {"b": {"path": "c", "split": "d"}}


def test_the_reference_engine_has_one_implementation() -> None:
    with pytest.raises(SimPOError, match=r"logps\.impl is mlx, but train\.engine=reference"):
        load_config(None, ["model=x", "logps.impl=mlx", "train.engine=reference"])


@pytest.mark.parametrize("text", ["1e5", "86e4321", "1E6", "-1e3", "0e0"])
@pytest.mark.parametrize("name", ["model", "revision", "data.train_split"])
def test_text_that_looks_like_a_number_reads_back(text: str, name: str, tmp_path: Path) -> None:
    config = load_config(None, ["model=x", f"{name}={text}"])
    assert load_config(write_config(tmp_path, config.to_yaml())) == config


def test_a_rare_line_break_reads_back(tmp_path: Path) -> None:
    config = SimPOConfig(model="x", data=DataConfig(chat_template="a\x85b"))
    assert load_config(write_config(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize("text", ["yes", "null", "1.5", "~", "a: b", " x ", "a\n\nb \n", "{% x %}"])
def test_text_that_looks_like_something_else_reads_back(text: str, tmp_path: Path) -> None:
    config = SimPOConfig(model=text, data=DataConfig(train=text, chat_template=text))
    assert load_config(write_config(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("model=org/a-model", "model", "org/a-model"),
        ("model=123", "model", "123"),
        ("output=a=b", "output", "a=b"),
        ("output=~/runs/x y", "output", "~/runs/x y"),
        ("revision=null", "revision", None),
        ("revision=86e4321", "revision", "86e4321"),
        ("trust_remote_code=true", "trust_remote_code", True),
        ("dtype=float32", "dtype", "float32"),
        ("seed=0", "seed", 0),
        ("data.train=12", "data.train", "12"),
        ("data.compat=official", "data.compat", "official"),
        ("data.chat_template={{ messages }}", "data.chat_template", "{{ messages }}"),
        ("objective.beta=10", "objective.beta", 10.0),
        ("lora.lora_alpha=null", "lora.lora_alpha", None),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ("q_proj", "v_proj")),
        ("lora.target_modules=[no]", "lora.target_modules", ("no",)),
        ("lora.num_layers=-1", "lora.num_layers", -1),
        ("train.learning_rate=1e-6", "train.learning_rate", 1e-6),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("train.compile=false", "train.compile", False),
    ],
)
def test_an_override_of_every_type(override: str, name: str, expected: Any) -> None:
    value: Any = load_config(None, ["model=x", override])
    for part in name.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank", "'lora.rank' is not a setting of the form name=value"),
        ("lora.rank:4", "'lora.rank:4' is not a setting of the form name=value"),
        ("", "'' is not a setting of the form name=value"),
        ("=5", "unknown setting ''"),
        ("lora.=5", "unknown setting 'lora.'"),
        ("lora.rank.x=5", "lora.rank is "),
        ("lora=5", "lora is '5'; it must be a section of settings"),
        ("model.x=5", "model is 'x', but model.x is set, too; remove one of them"),
        ("data.columns={a: b", "data.columns is not valid YAML"),
        ("lora.rank=four", "lora.rank is 'four'; it must be a whole number"),
        ("lora.rank=[", "lora.rank is not valid YAML"),
        ("gamma=1", "unknown setting 'gamma'; write objective.gamma_beta_ratio=0.5; here"),
        ("lr=1", "unknown setting 'lr'; write train.learning_rate=1"),
        ("lora.alpha=1", "unknown setting 'lora.alpha'; write lora.lora_alpha=1"),
        ("train.batchsize=1", "did you mean 'train.batch_size'?"),
    ],
)
def test_an_invalid_override_is_an_error(override: str, message: str) -> None:
    assert message in error_of(lambda: load_config(None, ["model=x", override]))


def test_overrides_win_over_the_file_and_change_nothing_else(tmp_path: Path) -> None:
    file = write_config(tmp_path, "model: a\nlora: {rank: 4, dropout: 0.1}\ntrain:\n  steps: 7\n")
    overrides = ["lora.rank=8", "train.steps=null", "train.epochs=2", "lora.rank=9"]
    assert load_config(file, overrides) == SimPOConfig(
        model="a", lora=LoRAConfig(rank=9, dropout=0.1), train=TrainConfig(epochs=2)
    )
    assert load_config(file).lora.rank == 4


def test_an_override_into_an_empty_section(tmp_path: Path) -> None:
    """All lines of a section commented out: YAML says null."""
    file = write_config(tmp_path, "model: x\nlora:\n#  rank: 4\n")
    assert load_config(file, ["lora.rank=8"]).lora.rank == 8
    assert load_config(file) == SimPOConfig(model="x")


def test_an_override_of_a_value_and_one_of_its_part_is_an_error() -> None:
    message = error_of(lambda: load_config(None, ["model.rank=4", "model=x"]))
    assert message == "model is 'x', but model.rank is set, too; remove one of them"
    message = error_of(
        lambda: load_config({"model": "x", "data": {"train": "a"}}, ["data.train.path=b"])
    )
    assert message == "data.train is 'a', but data.train.path is set, too; remove one of them"


def test_an_override_sets_one_name_of_a_mapping() -> None:
    file = {"model": "x", "data": {"columns": {"prompt": "a", "chosen": "b"}}}
    overrides = ["data.columns.prompt=question", "data.template_args.enable_thinking=false"]
    data = load_config(file, overrides).data
    assert data.columns == {"prompt": "question", "chosen": "b"}
    assert data.template_args == {"enable_thinking": False}
    data = load_config(
        file, ["data.columns={rejected: c}", "data.valid=null", "data.valid.a=d"]
    ).data
    assert data.columns == {"rejected": "c"}
    assert data.valid == {"a": SourceConfig("d")}


def test_all_mistakes_of_file_and_overrides_are_told() -> None:
    file = {"lora": {"rnk": 4}, "data": {"train": [{"path": "", "weight": 0}]}, "sed": 1}
    with pytest.raises(InvalidSettingsError) as caught:
        load_config(file, ["lora.dropout=2", "beta", "train.steps=1.5", "lora.rank=0"])
    assert [message.partition(";")[0] for message in caught.value.messages] == [
        "'beta' is not a setting of the form name=value",
        "unknown setting 'lora.rnk'",
        "lora.dropout is 2.0",
        "lora.rank is 0",
        "data.train[0].path is ''",
        "data.train[0].weight is 0.0",
        "unknown setting 'sed'",
        "train.steps is 1.5",
        "model is missing",
    ]
    assert str(caught.value).splitlines() == list(caught.value.messages)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- model: x", "must contain settings (name: value)"),
        ("5", "must contain settings (name: value)"),
        ("model", "must contain settings (name: value)"),
        ("model: x\nmodel: y", "'model' appears twice (line 2)"),
        ("model: x\nlora: {rank: 2, rank: 4}", "'rank' appears twice (line 2)"),
        ("model: [", "is not valid YAML"),
        ("model: x\n---\nmodel: y", "is not valid YAML"),
        ("model: x\nlora: [rank]", "lora is ['rank']; it must be a section of settings"),
        ("model: x\nlora: {data: {rank: 3}}", "unknown setting 'lora.data'"),
        ("model: x\ntrain: {learning_rate: 1e-6x}", "train.learning_rate is '1e-6x'"),
        ("model: x\ntrain: {compile: no}", "train.compile is 'no'; it must be true or false"),
        ("model: x\ntrain: {steps: 1e3}", "train.steps is 1000.0; it must be a whole number"),
        ("model: 5", "model is 5; it must be text"),
        ("lora: {rank: 4}", "model is missing; set it to the Hugging Face id or local folder"),
        ("", "model is missing; set it to the Hugging Face id or local folder"),
    ],
)
def test_an_invalid_file_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    assert message in error_of(lambda: load_config(write_config(tmp_path, text)))


@pytest.mark.parametrize("text", ["[]", "false", "0", "''"])
def test_an_empty_value_that_is_not_a_mapping_is_an_error(text: str, tmp_path: Path) -> None:
    file = write_config(tmp_path, text)
    assert "must contain settings" in error_of(lambda: load_config(file, ["model=x"]))


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "null"])
def test_an_empty_file_sets_nothing(text: str, tmp_path: Path) -> None:
    assert load_config(write_config(tmp_path, text), ["model=x"]) == SimPOConfig(model="x")


@pytest.mark.parametrize("content", [None, b"model: \xff\xfe", "folder"])
def test_an_unreadable_file_is_an_error_that_names_it(
    content: bytes | str | None, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    message = error_of(lambda: load_config(path))
    assert message.startswith(f"cannot read the configuration {str(path)!r}: ")


def test_a_file_from_another_system_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: x\r\nlora:\r\n  rank: 3\r\n")
    assert load_config(path) == SimPOConfig(model="x", lora=LoRAConfig(rank=3))


def test_every_field_of_every_section_is_a_setting() -> None:
    """There is no field that YAML cannot set."""
    names = {
        item.name if section is SimPOConfig else f"{section.NAME}.{item.name}"
        for section in (SimPOConfig, *SECTIONS.values())
        for item in fields(section)
        if not is_dataclass(item.default)
    }
    assert names == set(SETTINGS)


TOKEN = "hf_plantedSecretToken0123456789"


@pytest.mark.parametrize("name", ["model", "revision", "output", "data.train", "lora.init_from"])
@pytest.mark.parametrize("secret", [TOKEN, f"a/{TOKEN}", "https://ann:pass1234@example.org/x"])
def test_a_token_or_password_is_never_a_setting(name: str, secret: str, tmp_path: Path) -> None:
    """Settings end in config.yaml, in the adapter and in its model card."""
    file = tmp_path / "recipe.yaml"
    section, _, leaf = name.rpartition(".")
    content = {section: {leaf: secret}} if section else {leaf: secret}
    file.write_text(json.dumps({"model": "x", **content}))
    for read in (
        lambda: load_config(None, ["model=x", f"{name}={secret}"]),
        partial(load_config, file),
    ):
        with pytest.raises(SimPOError) as error:
            read()
        message = str(error.value)
        assert message.startswith(f"{name} is '")
        assert "which holds a token or password" in message
        assert message.endswith("log in with `hf auth login` or set HF_TOKEN")
        assert TOKEN not in message
        assert "pass1234" not in message


# --- of a run that goes on ---------------------------------------------------------------------


def run_with(folder: Path, *settings: str) -> SimPOConfig:
    """Write the configuration of a run into its folder, and return it."""
    config = load_config(None, ["model=x", f"output={folder}", *settings])
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return config


def test_a_run_goes_on_with_its_own_settings_and_those_that_change(tmp_path: Path) -> None:
    config = run_with(tmp_path / "run", "lora.rank=3", "train.steps=7", "data.train=pairs.jsonl")
    assert resume_config(tmp_path / "run") == config
    more = resume_config(tmp_path / "run", ["train.steps=null", "train.epochs=2"])
    assert more == replace(config, train=replace(config.train, steps=None, epochs=2.0))


def test_the_output_of_a_run_that_goes_on_is_where_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "a run")
    assert resume_config(tmp_path / "a run").output == str(tmp_path / "a run")
    monkeypatch.chdir(tmp_path)
    assert resume_config("a run").output == "a run"
    assert resume_config("a run", ["output=a run"]).output == "a run"
    message = error_of(lambda: resume_config("a run", ["output=other"]))
    assert message == (
        "output is 'other', but a run goes on in its own folder, a run; leave output=… away (the "
        "folder may be moved before)"
    )


@pytest.mark.parametrize("state", ["absent", "empty", "file"])
def test_a_folder_without_a_run_cannot_go_on(state: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if state == "empty":
        path.mkdir()
    elif state == "file":
        path.write_text("model: x")
    assert error_of(lambda: resume_config(path)) == (
        f"{path} holds no run that could be resumed (it has no config.yaml); name the output "
        "folder of a run"
    )


def test_a_setting_that_does_not_exist_is_an_error_when_a_run_goes_on(tmp_path: Path) -> None:
    run_with(tmp_path / "run")
    message = error_of(lambda: resume_config(tmp_path / "run", ["train.step=9"]))
    assert message.startswith("unknown setting 'train.step'; did you mean 'train.steps'?")
