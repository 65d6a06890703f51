"""The model card: README.md as the Hub shows it, of what a folder says about itself.

Nothing in it is guessed: what the record does not hold is left out. Names of local files and
folders are cut down to their last parts, and text of other people's making is shown as code, in
which neither Markdown nor HTML means anything.
"""

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..errors import SimPOError, one_line
from ..version import __version__
from .folders import Folder, at, read_text, text_or_none
from .markdown import code, number, section
from .outgoing import CARD
from .recorded import data_lines, results, settings_table
from .usage import usage

# By this line a card of ours is known again.
MARK = (
    "<!-- Written by mlx_simpo, and written anew by the next push; to keep changes, take this "
    "line out. -->"
)
_ABOUT = (
    "[SimPO](https://arxiv.org/abs/2405.14734) (Simple Preference Optimization, arXiv 2405.14734) "
    "trains on pairs of a preferred and a rejected answer. The reward of an answer is β times its "
    "average log-probability per token, without a reference model; the preferred one's is to be "
    "greater by a margin γ."
)
# From the card that is replaced: somebody has stated them.
_LICENSE = ("license", "license_name", "license_link")


def make_card(folder: Folder, repo: str, revision: str | None = None) -> str:
    """The text of README.md for ``folder`` in the repository ``repo`` (owner/name).

    Raises:
        SimPOError: a README.md that is there cannot be read.
    """
    front = metadata(folder).to_yaml().strip()
    parts = [
        f"# {repo.rpartition('/')[2]}",
        MARK,
        introduction(folder),
        section("Data", data_lines(folder)),
        section("Settings", settings_table(folder)),
        section("Results", results(folder)),
        section("How to use it", usage(folder, repo, revision)),
        section("About", about(folder)),
    ]
    return f"---\n{front}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def users_card(folder: Folder) -> str | None:
    """The text of the README.md in ``folder``; None if there is none, or a program wrote it.

    Raises:
        SimPOError: it cannot be read, or its first lines are no valid YAML.
    """
    card = read_card(folder)
    if card is None or MARK in card.content or is_of_mlx_lm(card):
        return None
    return read_text(folder.path / CARD)


def read_card(folder: Folder) -> ModelCard | None:
    """The README.md in ``folder``; raises as `users_card` does."""
    path = folder.path / CARD
    if not path.is_file():
        return None
    try:
        return ModelCard(read_text(path), ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = one_line(error)
        raise SimPOError(
            f"the lines between --- in {path} are not valid YAML: {reason}; mend them, or remove "
            "the file to have a card made"
        ) from None


def is_of_mlx_lm(card: ModelCard) -> bool:
    """Whether mlx-lm wrote a card: it leaves the text empty, or says which version converted."""
    if at(card.data.to_dict(), "library_name") != "mlx":
        return False
    return not card.text.strip() or "using mlx-lm version" in card.text


def metadata(folder: Folder) -> ModelCardData:
    """The card's YAML. Hub ids alone are named; language is left out, the license if unstated."""
    base = folder.public(folder.base)
    base_id = base.text if base and base.on_hub else None
    data = folder.public(at(folder.settings, "data.train"))
    how = ("simpo", "lora") if folder.settings else ()
    stated = stated_license(folder)
    return ModelCardData(
        base_model=base_id,
        base_model_relation=folder.kind.relation if base_id else None,
        library_name=folder.kind.library,
        pipeline_tag="text-generation",
        tags=[*how, *folder.kind.tags, "mlx-simpo"],
        datasets=[data.text] if data and data.on_hub else None,
        license=stated.get("license"),
        license_name=stated.get("license_name"),
        license_link=stated.get("license_link"),
    )


def stated_license(folder: Folder) -> dict[str, str]:
    """The license that a generated card states, else the folder's LICENSE file, else nothing."""
    card = read_card(folder)
    stated = card.data.to_dict() if card else {}
    found = {name: stated[name] for name in _LICENSE if text_or_none(stated.get(name))}
    if found:
        return found
    files = ("LICENSE", "LICENSE.txt", "LICENSE.md")
    file = next((name for name in files if (folder.path / name).is_file()), None)
    return {"license": "other", "license_link": file} if file else {}


def introduction(folder: Folder) -> str:
    """What it is and which model it comes from."""
    what = folder.kind.what
    base = shown_model(folder, folder.base, folder.revision)
    if folder.kind.relation == "adapter":
        text = f"A {what}, for {base}." if base else f"A {what}."
    else:
        text = f"A {what}, made from {base}." if base else f"A {what}."
    if not base:
        text += " The record does not say which base model it belongs to."
    other = folder.trained_on if folder.trained_on != folder.base else None
    if other:
        text += f" It was trained on {shown_model(folder, other, None)}."
    quantization = at(folder.record, "base.quantization")
    bits, size = at(quantization, "bits"), at(quantization, "group_size")
    if number(bits):
        groups = f" in groups of {size}" if number(size) else ""
        text += f" The model that was trained on was quantized to {bits} bits{groups}."
    if not folder.settings:
        text += " No record of how it was trained came with it."
    else:
        text += " It was trained with SimPO and LoRA."
    if at(folder.summary, "interrupted") is True:
        text += " The training was interrupted before its end."
    return text


def shown_model(folder: Folder, name: str | None, revision: str | None) -> str:
    """A model in words, with a link if it is on the Hub; "" if it is unknown."""
    found = folder.public(name)
    if found is None:
        return ""
    if not found.on_hub:
        return f"{code(found.text)} (a local folder of whoever trained it, not a Hub id)"
    at_revision = f" at revision {code(revision)}" if revision else ""
    return f"[{found.text}](https://huggingface.co/{found.text}){at_revision}"


def about(folder: Folder) -> str:
    """What SimPO is, and the versions."""
    version = text_or_none(at(folder.record, "version"))
    trained = f" The record was written by version {code(version)}." if version else ""
    made = (
        f"This card was made by [mlx_simpo](https://github.com/mlx-simpo/mlx_simpo) {__version__}."
    )
    return f"{_ABOUT}\n\n{made}{trained}"
