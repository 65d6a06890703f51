"""What stands out in data: said with counts, an example and what to do; silence if nothing does."""

from typing import Any

import pytest

from mlx_simpo.data.dropped import Dropped
from mlx_simpo.reporting.remarks import length_bias, remarks, template_text


def bias(share: float | None, pairs: int = 1000, chosen: float = 150.4) -> dict[str, Any]:
    return {
        "longer_chosen": share,
        "pairs": pairs,
        "mean_chosen": chosen,
        "mean_rejected": 100.0,
    }


def summary(**changes: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {
        "leaks": [{"source": "b", "in": ["a"], "checked": 9, "pairs": 0, "records": []}],
        "contradictory_pairs": [],
        "repeated_pairs": [],
        "near_prompts": [],
        "length_bias": bias(0.5),
        "responses_cut": 0,
    }
    return nothing | changes


def match(number: int, is_same: bool = True) -> dict[str, Any]:
    return {"pair": f"b:{number}", "like": f"a:{number}", "similarity": 1.0, "is_same": is_same}


def test_nothing_stands_out() -> None:
    assert remarks(summary()) == []


def test_leaks_come_first_with_the_clearest_example() -> None:
    records = [match(1, False), match(2), match(3)]
    leaks = [{"source": "b", "in": ["a", "c"], "checked": 10, "pairs": 3, "records": records}]
    first, second = remarks(summary(leaks=leaks, length_bias=bias(0.9)))
    assert first.startswith(
        "3 of 10 pairs of b (30.0%) have a prompt that is in a or c, too, 1 of them nearly, e.g. "
        "b:2 and a:2. "
    )
    assert "remove them from one of the two" in first
    assert second.startswith("In 90% of the pairs the longer response is preferred")


@pytest.mark.parametrize(
    ("name", "number", "start"),
    [
        ("contradictory_pairs", 1, "1 pair contradicts an earlier one: "),
        ("contradictory_pairs", 2, "2 pairs contradict an earlier one: "),
        ("repeated_pairs", 1, "1 pair repeats an earlier one, e.g. x:2 and x:1: "),
        ("repeated_pairs", 1200, "1,200 pairs repeat an earlier one, e.g. x:2 and x:1: "),
    ],
)
def test_pairs_that_repeat_or_contradict(name: str, number: int, start: str) -> None:
    (remark,) = remarks(summary(**{name: [["x:2", "x:1"]] * number}))
    assert remark.startswith(start)
    assert "x:2 and x:1" in remark
    assert "emove" in remark
    # Cut responses may be the same though the whole ones are not.
    (cut,) = remarks(summary(responses_cut=1, **{name: [["x:2", "x:1"]] * number}))
    assert cut.replace(" (both as truncated)", "") == remark != cut


@pytest.mark.parametrize("flag", Dropped)
def test_what_a_template_does_is_said_in_words(flag: Dropped) -> None:
    text = template_text(str(flag.name).lower())
    assert "_" not in text
    assert text.startswith("drops the ") is (flag.name in ("TOOLS", "SYSTEM", "THINKING"))


def test_near_prompts() -> None:
    assert remarks(summary(near_prompts=[match(1)]))[0].startswith("1 prompt is nearly the same")
    assert remarks(summary(near_prompts=[match(1)] * 3))[0].startswith("3 prompts are nearly")


@pytest.mark.parametrize(
    ("share", "pairs", "start"),
    [
        (0.75, 1000, "In 75% of the pairs the longer response is preferred (150 tokens on average"),
        (0.2, 1000, "In 80% of the pairs the shorter response is preferred (150 tokens"),
        (1.0, 200, "In all pairs the longer response is preferred"),
        (0.0, 200, "In all pairs the shorter response is preferred"),
        (0.601, 100_000, "In 60% of the pairs the longer"),
        (0.59, 100_000, None),  # as in most data
        (0.41, 100_000, None),
        (0.75, 12, None),  # four heads of twelve coins are no news
        (0.75, 20, "In 75%"),
        (None, 0, None),
    ],
)
def test_a_length_bias_is_told_if_it_is_large_and_no_accident(
    share: float | None, pairs: int, start: str | None
) -> None:
    text = length_bias(bias(share, pairs))
    assert text is None if start is None else text is not None and text.startswith(start)
    if text is not None:
        other = "shorter" if "the longer response" in text else "longer"
        assert f"the better response is the {other} one" in text
