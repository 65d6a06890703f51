"""The configuration: every setting's type and rule, YAML and overrides, what excludes what."""

import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_simpo import (
    DataConfig,
    LogpsConfig,
    LoRAConfig,
    ObjectiveConfig,
    SimPOConfig,
    SimPOError,
    TrainConfig,
    load_config,
)
from mlx_simpo.config.schema import Section, all_settings

SETTINGS = {name: (item, hint) for name, item, hint in all_settings(SimPOConfig)}
SECTIONS = {"data": DataConfig, "objective": ObjectiveConfig, "lora": LoRAConfig}
SECTIONS |= {"train": TrainConfig, "logps": LogpsConfig}
RULES = {
    # A rule's words: (values that break it, values at its edge)
    "greater than 0": ([0, -1], [1]),
    "0 or greater": ([-1], [0]),
    "0 or greater and less than 2**32": ([-1, 2**32, 2**64], [0, 2**32 - 1]),
    "at least 0 and less than 1": ([-0.1, 1, 1.5], [0, 0.999]),
    "between 0 and 1": ([-0.1, 1.1], [0, 1]),
    "at least 0 and less than 0.5": ([-0.1, 0.5, 1], [0, 0.499]),
    "2 or greater": ([1, 0, -1], []),  # 2 itself: test_the_smallest_lengths
    "-1 (all) or 1 and greater": ([0, -2], [-1, 1]),
    "not empty": ([""], ["x"]),
}
RULED = [name for name, (item, _) in SETTINGS.items() if item.metadata["rule"]]


def make(name: str, value: Any) -> Section:
    """The section of ``name`` with this one setting, made in Python."""
    section, _, leaf = name.rpartition(".")
    if not section:
        return SimPOConfig(**({"model": "x"} | {leaf: value}))
    return SECTIONS[section](**{leaf: value})


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def in_yaml(name: str, value: Any) -> str:
    """A configuration file with this one setting."""
    section, _, leaf = name.rpartition(".")
    line = f"{leaf}: {json.dumps(value)}\n"
    head = "" if name == "model" else "model: x\n"
    return head + (f"{section}:\n  {line}" if section else line)


def refused(make_it: Callable[[], Any]) -> str:
    with pytest.raises(SimPOError) as caught:
        make_it()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kind(hint: Any) -> tuple[str, bool]:
    """("int", whether null is allowed) of a setting's type."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if len(parts) == 1 and typing.get_origin(hint) is typing.Union:
        parts = typing.get_args(hint)
    inner = [p for p in typing.get_args(hint) or parts if p is not types.NoneType]
    if typing.get_origin(hint) is Literal:
        inner = [hint]
    first = inner[0]
    name = "choice" if typing.get_origin(first) is Literal else first.__name__
    return ("names" if len(inner) > 1 else name), types.NoneType in typing.get_args(hint)


WRONG_TYPES: dict[str, list] = {
    "int": [True, 1.0, "1", [1], {"a": 1}],
    "float": [True, "0.5", math.nan, math.inf, -math.inf, [0.5]],
    "bool": [0, 1, "true", "yes", [True]],
    "str": [0, 1.5, True, ["x"], {"a": "x"}],
    "choice": ["", "Auto", 1, True, ["cosine"]],
    "names": [0, True, [1], ["q_proj", None], {"q_proj": 1}],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_type_is_refused_with_name_and_value(name: str) -> None:
    what, may_be_null = kind(SETTINGS[name][1])
    for value in [*WRONG_TYPES[what], *([] if may_be_null else [None])]:
        message = refused(lambda value=value: make(name, value))
        assert message.startswith(f"{name} is {value!r}; it must be ")


@pytest.mark.parametrize("name", SETTINGS)
def test_null_is_taken_only_where_it_means_something(name: str) -> None:
    item, hint = SETTINGS[name]
    if kind(hint)[1]:
        assert getattr(make(name, None), item.name) is None
    else:
        assert "it must be" in refused(lambda: make(name, None))


@pytest.mark.parametrize("name", RULED)
def test_a_broken_rule_is_named_with_the_setting_and_the_value(name: str, tmp_path: Path) -> None:
    item, hint = SETTINGS[name]
    rule = item.metadata["rule"].text
    assert RULES[rule][0]
    for bad in RULES[rule][0]:
        if kind(hint)[0] == "int" and isinstance(bad, float):
            continue
        value = float(bad) if kind(hint)[0] == "float" else bad
        expected = f"{name} is {value!r}; it must be {rule}"
        file = written(tmp_path, in_yaml(name, bad))
        for way in (
            lambda bad=bad: make(name, bad),
            lambda file=file: load_config(file),
            lambda bad=bad: load_config(None, ["model=x", f"{name}={bad}"]),
        ):
            assert refused(way) == expected


@pytest.mark.parametrize("name", RULED)
def test_a_rule_holds_at_its_edge(name: str) -> None:
    item, hint = SETTINGS[name]
    for value in RULES[item.metadata["rule"].text][1]:
        if kind(hint)[0] != "int" or isinstance(value, int):
            expected = float(value) if kind(hint)[0] == "float" else value
            assert getattr(make(name, value), item.name) == expected


def test_the_smallest_lengths() -> None:
    assert DataConfig(max_length=2, max_prompt_length=1).max_length == 2


def test_every_number_has_a_rule_and_every_setting_a_meaning() -> None:
    numbers = {n for n, (_, hint) in SETTINGS.items() if kind(hint)[0] in ("int", "float")}
    assert numbers <= set(RULED)
    assert all(item.metadata["help"] for item, _ in SETTINGS.values())


@pytest.mark.parametrize("name", ["data.train", "data.valid", "lora.init_from"])
def test_an_empty_path_is_refused(name: str) -> None:
    assert name in refused(lambda: load_config(None, ["model=x", f"{name}="]))


@pytest.mark.parametrize("section", [SimPOConfig, *SECTIONS.values()])
def test_sections_cannot_be_changed(section: type) -> None:
    config = section(**({"model": "x"} if section is SimPOConfig else {}))
    for item in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, item.name, getattr(config, item.name))


def test_replace_is_checked_like_everything_else() -> None:
    assert "lora.rank is 0" in refused(lambda: replace(LoRAConfig(), rank=0))


def test_a_section_given_as_a_dict_in_python_is_refused() -> None:
    assert "lora" in refused(lambda: SimPOConfig(model="x", lora={"rank": 4}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "given", "words"),
    [
        ("data", {"max_length": 100, "max_prompt_length": 100}, "data.max_prompt_length is 100"),
        ("data", {"max_length": 100}, "less than data.max_length (100)"),
        ("data", {"valid_split": "test"}, "data.valid_split is set without data.valid"),
        ("data", {"compat": "official", "chat_template": "none"}, "needs a chat template"),
        ("objective", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing is 0.1"),
        ("lora", {"scale": 2.0, "lora_alpha": 16}, "lora.scale and lora.lora_alpha both"),
        ("lora", {"scale": 2.0, "rslora": True}, "lora.scale and lora.rslora both"),
        ("lora", {"target_modules": "q_proj"}, "it must be all-linear or a list, [q_proj]"),
        ("lora", {"target_modules": ()}, "lora.target_modules is empty"),
        ("lora", {"target_modules": ""}, "lora.target_modules"),
        ("train", {"epochs": 1, "steps": 10}, "train.epochs and train.steps both set the length"),
    ],
)
def test_settings_that_exclude_each_other(
    section: str, given: dict, words: str, tmp_path: Path
) -> None:
    assert words in refused(lambda: SECTIONS[section](**given))
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    file = written(tmp_path, json.dumps({"model": "x", section: plain}))
    assert words in refused(lambda: load_config(file))


@pytest.mark.parametrize(
    ("section", "given"),
    [
        ("data", {"max_length": 513}),
        ("data", {"valid": "x", "valid_split": "test"}),
        ("data", {"compat": "official"}),
        ("objective", {"loss_type": "hinge"}),
        ("objective", {"label_smoothing": 0.1}),
        ("lora", {"lora_alpha": 16, "rslora": True}),
        ("lora", {"scale": 2.0}),
        ("lora", {"target_modules": ["q_proj"]}),
        ("train", {"epochs": 0.5}),
    ],
)
def test_settings_that_go_together(section: str, given: dict) -> None:
    assert SECTIONS[section](**given)


@pytest.mark.parametrize(
    ("given", "scale"),
    [
        ({}, 2.0),
        ({"rank": 64}, 2.0),
        ({"rank": 8, "lora_alpha": 32}, 4.0),
        ({"rank": 16, "lora_alpha": 1}, 0.0625),
        ({"rank": 16, "rslora": True}, 8.0),
        ({"rank": 16, "lora_alpha": 8, "rslora": True}, 2.0),
        ({"rank": 16, "scale": 20}, 20.0),
    ],
)
def test_the_scale_of_the_update(given: dict, scale: float) -> None:
    assert LoRAConfig(**given).resolved_scale == scale


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


def value_of(name: str) -> st.SearchStrategy:
    """Values that one setting takes, apart from the others."""
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
        values = st.just("all-linear") | st.lists(texts(), min_size=1).map(tuple)
    else:
        values = texts(min_size=1 if rule else 0)
    return st.none() | values if may_be_null else values


@st.composite
def configs(draw: st.DrawFn) -> SimPOConfig:
    """Any configuration that is valid."""
    drawn = {name: draw(value_of(name), label=name) for name in SETTINGS}
    drawn["data.max_length"] = max(2, drawn["data.max_length"])
    drawn["data.max_prompt_length"] = draw(st.integers(1, drawn["data.max_length"] - 1))
    if drawn["data.valid"] is None:
        drawn["data.valid_split"] = None
    if drawn["data.compat"]:
        drawn["data.chat_template"] = "auto"
    if drawn["objective.loss_type"] == "hinge":
        drawn["objective.label_smoothing"] = 0.0
    if drawn["lora.scale"] is not None:
        drawn["lora.lora_alpha"], drawn["lora.rslora"] = None, False
    if drawn["train.steps"] is not None:
        drawn["train.epochs"] = None
    if drawn["train.engine"] == "shared_prefix" and drawn["train.compile"]:
        drawn["train.compile"] = None
    if drawn["train.engine"] == "reference":
        drawn["logps.impl"] = "auto"
    groups: dict[str, dict] = {"": {}, **{section: {} for section in SECTIONS}}
    for name, value in drawn.items():
        section, _, leaf = name.rpartition(".")
        groups[section][leaf] = value
    sections: dict[str, Any] = {name: SECTIONS[name](**groups[name]) for name in SECTIONS}
    return SimPOConfig(**groups[""], **sections)


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
def test_overrides_say_what_yaml_says(config: SimPOConfig) -> None:
    overrides = []
    for name, (_, hint) in SETTINGS.items():
        section, _, leaf = name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, leaf)
        if kind(hint)[0] == "names" and value != "all-linear":
            value = ["q_proj", "k_proj"]
            config = replace(config, lora=replace(config.lora, target_modules=tuple(value)))
        assume(value != "null" or not kind(hint)[1])  # the word would be the value null
        overrides.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    assert load_config(None, overrides) == config


def test_the_defaults_read_back() -> None:
    text = SimPOConfig(model="x").to_yaml()
    assert text.startswith("model: x\n")
    assert "\n  rank: 16\n" in text


def test_the_engine_that_is_never_compiled_says_so() -> None:
    with pytest.raises(SimPOError, match=r"train\.compile is true, but only the reference engine"):
        load_config(None, ["model=x", "train.compile=true"])
    with pytest.raises(SimPOError, match=r"logps\.impl is mlx, but train\.engine=reference"):
        load_config(None, ["model=x", "logps.impl=mlx", "train.engine=reference"])
    assert load_config(None, ["model=x", "train.compile=false"]).train.compile is False


@pytest.mark.parametrize("text", ["1e5", "86e4321", "1E6", "-1e3", "0e0"])
@pytest.mark.parametrize("name", ["model", "revision", "data.train_split"])
def test_text_that_looks_like_a_number_reads_back(text: str, name: str, tmp_path: Path) -> None:
    config = load_config(None, ["model=x", f"{name}={text}"])
    assert load_config(written(tmp_path, config.to_yaml())) == config


def test_a_rare_line_break_reads_back(tmp_path: Path) -> None:
    config = SimPOConfig(model="x", data=DataConfig(chat_template="a\x85b"))
    assert load_config(written(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize("text", ["yes", "null", "1.5", "~", "a: b", " x ", "a\n\nb \n", "{% x %}"])
def test_text_that_looks_like_something_else_reads_back(text: str, tmp_path: Path) -> None:
    config = SimPOConfig(model=text, data=DataConfig(train=text, chat_template=text))
    assert load_config(written(tmp_path, config.to_yaml())) == config


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
    found: Any = load_config(None, ["model=x", override])
    for part in name.split("."):
        found = getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank", "'lora.rank' is not a setting of the form name=value"),
        ("lora.rank:4", "'lora.rank:4' is not a setting of the form name=value"),
        ("", "'' is not a setting of the form name=value"),
        ("=5", "unknown setting ''"),
        ("lora.=5", "unknown setting 'lora.'"),
        ("lora.rank.x=5", "lora.rank is "),
        ("lora=5", "lora is '5'; it must be a group of settings"),
        ("model.x=5", "unknown setting 'model.x'"),
        ("lora.rank=four", "lora.rank is 'four'; it must be a whole number"),
        ("lora.rank=[", "lora.rank is not valid YAML"),
        ("gamma=1", "did you mean objective.gamma_beta_ratio"),
        ("lr=1", "did you mean train.learning_rate?"),
        ("lora.alpha=1", "did you mean lora.lora_alpha?"),
        ("train.batchsize=1", "did you mean 'train.batch_size'?"),
    ],
)
def test_a_wrong_override_is_refused(override: str, message: str) -> None:
    assert message in refused(lambda: load_config(None, ["model=x", override]))


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    file = written(tmp_path, "model: a\nlora: {rank: 4, dropout: 0.1}\ntrain:\n  steps: 7\n")
    found = load_config(file, ["lora.rank=8", "train.steps=null", "train.epochs=2", "lora.rank=9"])
    assert found == SimPOConfig(
        model="a", lora=LoRAConfig(rank=9, dropout=0.1), train=TrainConfig(epochs=2)
    )
    assert load_config(file).lora.rank == 4


def test_an_override_into_an_empty_section(tmp_path: Path) -> None:
    """All lines of a section commented out: YAML says null."""
    file = written(tmp_path, "model: x\nlora:\n#  rank: 4\n")
    assert load_config(file, ["lora.rank=8"]).lora.rank == 8
    assert load_config(file) == SimPOConfig(model="x")


def test_no_override_is_dropped() -> None:
    assert "model.rank" in refused(lambda: load_config(None, ["model.rank=4", "model=x"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- model: x", "must hold settings (name: value)"),
        ("5", "must hold settings (name: value)"),
        ("model", "must hold settings (name: value)"),
        ("model: x\nmodel: y", "'model' stands twice (line 2)"),
        ("model: x\nlora: {rank: 2, rank: 4}", "'rank' stands twice (line 2)"),
        ("model: [", "is not valid YAML"),
        ("model: x\n---\nmodel: y", "is not valid YAML"),
        ("model: x\nlora: [rank]", "lora is ['rank']; it must be a group of settings"),
        ("model: x\nlora: {data: {rank: 3}}", "unknown setting 'lora.data'"),
        ("model: x\ntrain: {learning_rate: 1e-6x}", "train.learning_rate is '1e-6x'"),
        ("model: x\ntrain: {compile: no}", "train.compile is 'no'; it must be true or false"),
        ("model: x\ntrain: {steps: 1e3}", "train.steps is 1000.0; it must be a whole number"),
        ("model: 5", "model is 5; it must be text"),
        ("lora: {rank: 4}", "model is missing; it must be given"),
        ("", "model is missing; it must be given"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refused(lambda: load_config(written(tmp_path, text)))


@pytest.mark.parametrize("text", ["[]", "false", "0", "''"])
def test_a_file_that_is_empty_but_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    assert "must hold settings" in refused(lambda: load_config(file, ["model=x"]))


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "null"])
def test_an_empty_file_says_nothing(text: str, tmp_path: Path) -> None:
    assert load_config(written(tmp_path, text), ["model=x"]) == SimPOConfig(model="x")


@pytest.mark.parametrize("content", [None, b"model: \xff\xfe", "folder"])
def test_an_unreadable_file_is_named(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    message = refused(lambda: load_config(path))
    assert message.startswith(f"cannot read the configuration {str(path)!r}: ")


def test_a_file_from_another_system_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: x\r\nlora:\r\n  rank: 3\r\n")
    assert load_config(path) == SimPOConfig(model="x", lora=LoRAConfig(rank=3))


def test_every_field_of_every_section_is_a_setting() -> None:
    """No field that YAML could not reach."""
    found = {
        item.name if section is SimPOConfig else f"{section.NAME}.{item.name}"
        for section in (SimPOConfig, *SECTIONS.values())
        for item in fields(section)
        if not is_dataclass(item.default)
    }
    assert found == set(SETTINGS)
