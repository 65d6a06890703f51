"""Wrong versions that are not wrong: what they change cannot be seen in any result.

mutation/equivalent/*.yaml hold them, each with its reason:

    - module: engine/head
      before: the line as it is, stripped
      after: the line as it is changed (or a list of them)
      reason: why no result can differ
"""

from functools import cache
from pathlib import Path

import yaml

from .sample import Mutant
from .scope import short

FOLDER = Path(__file__).parent / "equivalent"


@cache
def equivalents() -> dict[tuple[str, str, str], str]:
    """Return the reasons, by module, line and changed line."""
    reasons = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        for entry in yaml.safe_load(file.read_text(encoding="utf-8")) or []:
            after = entry["after"]
            for line in after if isinstance(after, list) else [after]:
                key = (entry["module"], *(" ".join(t.split()) for t in (entry["before"], line)))
                reasons[key] = entry["reason"]
    return reasons


def reason(mutant: Mutant) -> str | None:
    """Return why a wrong version is none, or None."""
    texts = (" ".join(text.split()) for text in (mutant.before, mutant.after))
    return equivalents().get((short(mutant.module), *texts))
