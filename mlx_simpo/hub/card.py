"""The model card: README.md as the Hub shows it, filled in with what a folder says about itself.

Nothing in it is guessed: what the record does not hold is omitted. Names of local files and folders
are cut down to their last parts, and text written by other people is shown as code.
"""

from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..errors import SimPOError, one_line, redacted
from .card_datasets import datasets
from .card_values import card_values
from .folders import Folder, as_text, lookup, read_text
from .outgoing import CARD

# This line marks a card that this package has written.
MARK = (
    "<!-- Written by mlx_simpo; the next push replaces it. To keep your changes, remove this "
    "line. -->"
)
TEMPLATE = Path(__file__).with_name("card.md.jinja")
_LICENSE_FIELDS = ("license", "license_name", "license_link")
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def make_card(folder: Folder, repo: str, revision: str | None = None) -> str:
    """Return the text of README.md for ``folder`` in the repository ``repo`` (owner/name).

    Raises:
        SimPOError: there is a README.md that cannot be read.
    """
    values = card_values(folder, repo, revision)
    card = ModelCard.from_template(metadata(folder), str(TEMPLATE), mark=MARK, **values)
    return redacted(f"{card}\n")  # the record may come from elsewhere


def users_card(folder: Folder) -> str | None:
    """Return the text of the README.md in ``folder``; None if there is none, or a program wrote it.

    Raises:
        SimPOError: it cannot be read, or its first lines are not valid YAML.
    """
    card = read_card(folder)
    if card is None or MARK in card.content or is_mlx_lm_card(card):
        return None
    return read_text(folder.path / CARD)


def read_card(folder: Folder) -> ModelCard | None:
    """Read the README.md in ``folder``; None if there is none.

    Raises:
        SimPOError: it cannot be read, or its first lines are not valid YAML.
    """
    path = folder.path / CARD
    if not path.is_file():
        return None
    try:
        return ModelCard(read_text(path), ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = one_line(error)
        raise SimPOError(
            f"the lines between --- in {path} are not valid YAML: {reason}; fix them, or remove "
            "the file to have a card written"
        ) from None


def is_mlx_lm_card(card: ModelCard) -> bool:
    """Return whether mlx-lm wrote a card: it leaves the text empty, or names its version there."""
    if lookup(card.data.to_dict(), "library_name") != "mlx":
        return False
    return not card.text.strip() or "using mlx-lm version" in card.text


def metadata(folder: Folder) -> ModelCardData:
    """Return the card's metadata.

    Only Hub ids are named. There is no language, and no license unless somebody has stated one.

    Raises:
        SimPOError: there is a README.md that cannot be read.
    """
    base = folder.public_name(folder.base)
    base_id = base.text if base and base.on_hub else None
    trained_on = [line for line in datasets(folder) if line.title == "Pairs" and line.name.on_hub]
    training_tags = ("simpo", "lora") if folder.settings else ()
    license_fields = stated_license(folder)
    return ModelCardData(
        base_model=base_id,
        base_model_relation=folder.kind.relation if base_id else None,
        library_name=folder.kind.library,
        pipeline_tag="text-generation",
        tags=[*training_tags, *folder.kind.tags, "mlx-simpo"],
        datasets=list(dict.fromkeys(line.name.text for line in trained_on)) or None,
        license=license_fields.get("license"),
        license_name=license_fields.get("license_name"),
        license_link=license_fields.get("license_link"),
    )


def stated_license(folder: Folder) -> dict[str, str]:
    """Return the license of the card that is replaced, else the LICENSE file, as metadata.

    Raises:
        SimPOError: there is a README.md that cannot be read.
    """
    card = read_card(folder)
    fields = card.data.to_dict() if card else {}
    if stated := {name: fields[name] for name in _LICENSE_FIELDS if as_text(fields.get(name))}:
        return stated
    file = next((name for name in _LICENSE_FILES if (folder.path / name).is_file()), None)
    return {"license": "other", "license_link": file} if file else {}
