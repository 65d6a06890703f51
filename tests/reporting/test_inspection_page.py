"""The page: right numbers, hostile records as text, nothing from elsewhere."""

import base64
import hashlib
import itertools
import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import CHATML, system, tiny_folder, user, write_jsonl

from mlx_simpo import inspect, load_config
from mlx_simpo.api import Inspection
from mlx_simpo.reporting.inspection_page import chosen_indices, inspection_page

VOID = {"meta", "input", "br", "img", "link"}
LONG = (
    "My sourdough bread has a dense crumb although I let the dough rise for six hours at room "
    "temperature and fold it four times. What could be the reason, and what should I change?"
)
HOSTILE = [
    "<script>alert(1)</script>",
    "</script></style></title><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 191 }}{% for x in y %}",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "<!-- comment -- > --> ]]> <![CDATA[",
    "javascript:alert(1)",
    "bell\x07 escape\x1b[31m null\x00 return\r del\x7f c1\x9b",
    "turned \u202e around \u2066 isolated",
]


class Page(HTMLParser):
    """A page, parsed: fails where elements do not close in order.

    tags: how often each occurs. attributes: all (tag, name, value). texts: of elements by class.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = defaultdict(int)
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = defaultdict(list)
        self.stack: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        classes = [*(dict(attrs).get("class") or "").split(), tag]
        if tag not in VOID:
            self.stack.append((tag, classes))
            for name in classes:
                self.texts[name].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, tag
        opened, _ = self.stack.pop()
        assert opened == tag

    def handle_data(self, data: str) -> None:
        for _, classes in self.stack:
            for name in classes:
                self.texts[name][-1] += data

    def values(self, name: str) -> list[str]:
        """The values of an attribute, wherever it occurs."""
        return [value for _, other, value in self.attributes if other == name]


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """Two sources with everything that a page can say."""
    folder = tmp_path_factory.mktemp("page")
    model = tiny_folder(folder / "model", template=CHATML)
    rows: list[dict[str, Any]] = [
        {"prompt": text, "chosen": text + " chosen", "rejected": text} for text in HOSTILE
    ]
    rows += [
        {"prompt": "What is the sky made of?", "chosen": "Air", "rejected": "Cheese, I think"},
        {"prompt": "What is the sky made of?", "chosen": "Cheese, I think", "rejected": "Air"},
        {"prompt": "what is the SKY made of", "chosen": "Air", "rejected": "Cheese, I think"},
        {"prompt": LONG, "chosen": "Time", "rejected": "Heat and more of it"},
        {"prompt": [system("Be brief."), user("天気は🎉")], "chosen": "晴れ", "rejected": "雨 <b>"},
        {"prompt": "word " * 300, "chosen": "yes " * 200, "rejected": "no"},
        {"prompt": "<i>no</i>", "chosen": "<u>", "rejected": "<u>"},
        {"prompt": "no responses"},
    ]
    rows = [row if isinstance(row["prompt"], str) else row | _as_messages(row) for row in rows]
    train = write_jsonl(folder / "train.jsonl", rows)
    valid = write_jsonl(
        folder / "valid.jsonl",
        [
            {"prompt": "Who was the first one?", "chosen": "Adam", "rejected": "Eve, or the egg"},
            {"prompt": LONG.replace("six", "ten"), "chosen": "Time", "rejected": "Heat, really"},
            {"prompt": "What is the sky made of", "chosen": "Blue", "rejected": "It is not known"},
        ],
    )
    config = load_config(
        None, [f"model={model}", "data.max_length=256", "data.max_prompt_length=100"]
    )
    return inspect(config, [str(train), str(valid)])


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}


@pytest.fixture(scope="module")
def html(inspected: Inspection) -> str:
    return page_of(inspected)


def page_of(result: Inspection, limit: int = 500) -> str:
    return inspection_page(result.overview, result.summary, result.encoder, "a <model>", limit)


def test_the_page_has_the_right_numbers(inspected: Inspection, html: str) -> None:
    page, summary = Page(html), inspected.summary
    assert (summary["pairs"], summary["records"]) == (19, 21)
    tiles = [re.sub(r"\s+", " ", text).strip() for text in page.texts["tile"]]
    share = summary["length_bias"]["longer_chosen"]
    assert tiles == [
        "19pairs of 21 records",
        "2records quarantined",
        "16different prompts",
        f"{summary['scored_tokens']:,}scored tokens of {summary['tokens']:,}",
        f"{share:.0%}prefer the longer response",
        "2prompts in two sources",
    ]
    assert len(page.texts["pair"]) == 19
    cells = "".join(page.texts["table"])
    for name, values in summary["lengths"].items():
        assert name in cells
        assert all(f"{value:,}" in cells for value in values.values())


def test_each_pair_is_there_with_its_scored_tokens(inspected: Inspection, html: str) -> None:
    page = Page(html)
    tokenizer = inspected.encoder.tokenizer
    sides = page.texts["tokens"]
    for index, pair in enumerate(inspected.pairs):
        shown = sides[3 * index : 3 * index + 3]
        for sequence, text in zip((pair.chosen, pair.rejected), shown[1:], strict=True):
            expected = tokenizer.decode(sequence.tokens[sequence.score_start :].tolist())
            assert plain(text) == plain(expected)
        expected = tokenizer.decode(pair.chosen.tokens[: pair.chosen.score_start].tolist())
        assert plain(shown[0]) == plain(expected)


def plain(text: str) -> str:
    """Text without what the page adds to it, as letters that show what was escaped."""
    text = text.replace("↵\n", "\n")
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
        lambda m: repr(m[0])[1:-1],
        text,
    )


def test_every_token_is_an_element(inspected: Inspection, html: str) -> None:
    """A character of several tokens is one element that says how many it is."""
    sections = re.findall(r'<div class="tokens (?:chosen|rejected)">(.*?)</div>', html, re.S)
    numbers = [s.num_scored for pair in inspected.pairs for s in (pair.chosen, pair.rejected)]
    for section, number in zip(sections, numbers, strict=True):
        several = [int(n) for n in re.findall(r'<b title="(\d+) tokens">', section)]
        assert section.count("<b") - len(several) + sum(several) == number
    assert 'title="3 tokens"' in html


def test_hostile_records_are_text(html: str) -> None:
    page = Page(html)
    assert page.tags["script"] == page.tags["style"] == page.tags["main"] == page.tags["h1"] == 1
    assert not {"img", "iframe", "object", "u", "link"} & page.tags.keys()
    names = {name for _, name, _ in page.attributes}
    assert not any(name.startswith("on") for name in names)
    assert "style" not in names
    for text in ("<script>alert(1)</script>", "{{ 7 * 191 }}", "&lt;b&gt; &amp; &#60;i&#62;"):
        assert any(text in shown for shown in page.texts["excerpt"])
    assert "1337" not in html
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html
    )
    assert "\\x1b[31m" in html
    assert "\\u202e" in html


def test_half_of_a_surrogate_pair_cannot_break_the_page(
    inspected: Inspection, tmp_path: Path
) -> None:
    """From the name of a file with bytes that are no UTF-8, for example."""
    summary = {
        **inspected.summary,
        "quarantined_records": [
            {"source": "p\udcff.jsonl:1", "reason": "empty response", "detail": "\ud83d <b>"}
        ],
    }
    html = inspection_page(inspected.overview, summary, inspected.encoder, "m\udcff")
    html.encode("utf-8")
    assert "p\\udcff.jsonl:1" in html
    assert "\\ud83d &lt;b&gt;" in html


def test_nothing_comes_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert page.values("src") == []
    assert all(value.startswith("#pair-") for value in page.values("href"))
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(|XMLHttp|WebSocket", html)
    (policy,) = (v for v in page.values("content") if "default-src" in v)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_links_lead_to_pairs_on_the_page(html: str) -> None:
    page = Page(html)
    links = page.values("href")
    assert links
    assert {link.removeprefix("#") for link in links} <= set(page.values("id"))


def test_flags_say_what_is_wrong_with_a_pair(html: str) -> None:
    page = Page(html)
    flags = [value.split("|") if value else [] for value in page.values("data-flags")]
    assert flags[11] == ["contradiction"]
    assert flags[12] == ["contradiction", "repeated pair"]
    assert flags[15] == ["prompt cut", "response cut"]
    assert flags[17] == flags[18] == ["leak"]
    assert sum(map(bool, flags)) == 5
    about = page.texts["about"][17]
    assert "prompt is nearly also at" in about
    assert "train.jsonl:14" in about


def test_matches_and_quarantined_records_are_listed(inspected: Inspection, html: str) -> None:
    page = Page(html)
    lists = [re.sub(r"\s+", " ", text) for text in page.texts["list"]]
    leaks = next(text for text in lists if "(2 of 3)" in text)
    assert "% alike" in leaks
    assert "the same" in leaks
    assert any("Pairs that contradict an earlier one (2)" in text for text in lists)
    assert any("Pairs that repeat an earlier one (1)" in text for text in lists)
    cells = page.texts["td"]
    assert "identical responses" in cells
    assert "missing response" in cells


def test_a_limited_page_says_so_and_shows_what_stands_out(inspected: Inspection) -> None:
    html = page_of(inspected, 8)
    page = Page(html)
    assert len(page.texts["pair"]) == 8
    assert "8 of 19 pairs: those that stand out first, the others drawn evenly" in html
    ids = set(page.values("id"))
    assert {"pair-11", "pair-12", "pair-15", "pair-17"} <= ids
    assert {link.removeprefix("#") for link in page.values("href")} <= ids


@pytest.mark.parametrize(("count", "flagged", "limit"), [(1000, 3, 50), (1000, 400, 50), (7, 7, 3)])
def test_chosen_indices(count: int, flagged: int, limit: int) -> None:
    marked = list(range(count - 1, count - 1 - flagged, -1))
    result = chosen_indices(count, marked, limit)
    assert result == sorted(set(result))
    assert len(result) == limit
    assert len(set(result) & set(marked)) >= min(flagged, limit // 2)
    others = [index for index in result if index < count - flagged]
    if others:
        assert others[0] == 0
        assert max(b - a for a, b in itertools.pairwise(others)) < 4 * count / limit


def test_all_pairs_if_there_are_few() -> None:
    assert chosen_indices(5, [4], 5) == [0, 1, 2, 3, 4]


def test_without_anything_special(tmp_path: Path, model_folder: Path) -> None:
    rows = [
        {"prompt": f"Question {n}?", "chosen": "yes" * (1 + n % 2), "rejected": "no " * (1 + n % 3)}
        for n in range(6)
    ]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    result = inspect(load_config(None, [f"model={model_folder}"]), str(data))
    html = page_of(result)
    Page(html)
    assert "Nothing stands out" in html
    assert "Sources</h2>" not in html
    assert 'id="quarantined"' not in html
    assert "prompts in two sources" not in html
