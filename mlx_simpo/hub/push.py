"""Send an adapter or a model to the Hugging Face Hub, with its card.

Files are listed one by one and sent in a single commit; other files of the repository are left
alone. huggingface_hub handles the token: it is not asked for, stored or shown here.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Of httpx, or of its successor: whichever this version of huggingface_hub uses.
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id

from ..errors import SimPOError, one_line, redacted
from ..reporting.display import Display
from .card import make_card, users_card
from .folders import open_folder
from .outgoing import CARD, sort_files, without_paths

# What huggingface_hub raises; RuntimeError comes from its uploader, which is written in Rust.
HUB_ERRORS = (TransportError, OSError, ValueError, RuntimeError)


class Entry(NamedTuple):
    """One file of the commit.

    content: bytes that are sent in its place; None: the file as it is. size: in bytes. note: what
    is special about it, or "".
    """

    name: str
    content: bytes | None
    size: int
    note: str


class Push(NamedTuple):
    """What was sent, or in a dry run would be sent.

    private: whether a private repository was asked for. kind: the folder's. stays: (name, reason)
    of files that are not sent. card: the text of README.md. url: of the commit, None in a dry run.
    """

    repo: str
    private: bool
    revision: str | None
    kind: str
    files: tuple[Entry, ...]
    stays: tuple[tuple[str, str], ...]
    card: str
    url: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the content for JSON, without the files' bytes."""
        files = [{"name": e.name, "bytes": e.size, "note": e.note} for e in self.files]
        stays = [{"name": name, "why": why} for name, why in self.stays]
        return {**self._asdict(), "files": files, "stays": stays}


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    message: str | None = None,
    display: Display | None = None,
) -> Push:
    """Send ``folder`` to the model repository ``repo`` (owner/name), created if it does not exist.

    Args:
        private: create the repository as a private one; if it exists and is public, nothing is
            sent. Without it, a new one is as its owner's account creates them, usually public.
        dry_run: touch neither the network nor the folder.
        revision: the branch, created if it does not exist; None: main.
        message: of the commit.

    Raises:
        SimPOError: the folder or a name is not valid, or the Hub does not accept them.
    """
    display = display or Display()
    check_names(repo, revision)
    opened = open_folder(folder)
    files = sort_files(opened)
    own = users_card(opened)
    card = make_card(opened, repo, revision) if own is None else own
    entries = []
    for file in files.sent:
        content = without_paths(file, opened)
        size = file.stat().st_size if content is None else len(content)
        note = "" if content is None else "local paths cut"
        entries.append(Entry(file.name, content, size, note))
    card_bytes = card.encode("utf-8", "backslashreplace")
    note = "written for it" if own is None else "as you wrote it"
    entries.append(Entry(CARD, card_bytes, len(card_bytes), note))
    plan = Push(
        repo, private, revision, opened.kind.name, tuple(entries), tuple(files.stays), card, None
    )
    if dry_run:
        return plan
    display.note(f"sending {len(entries)} files, {sum(e.size for e in entries):,} bytes, to {repo}")
    try:
        url = send(plan, opened.path, message or f"Upload {opened.kind.description}")
    except HUB_ERRORS as error:
        raise hub_error(error, plan) from None
    return plan._replace(url=url)


def check_names(repo: str, revision: str | None) -> None:
    """Check the names of the repository and of its branch.

    Raises:
        SimPOError: the Hub has no such names, or the repository's owner is missing.
    """
    rule = "it must be owner/name, of letters, digits, -, _ and ."
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise SimPOError(f"the repository is {repo!r}; {rule}") from None
    if "/" not in repo:
        raise SimPOError(f"the repository is {repo!r}; {rule}: put your user name before it")
    if revision is not None and not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII):
        raise SimPOError(
            f"the revision is {revision!r}; it must be a branch's name, of letters, digits and _./-"
        )


def send(plan: Push, folder: Path, message: str) -> str:
    """Create the repository and the branch if they do not exist, commit, and return the URL.

    Raises:
        SimPOError: a private repository was asked for, and it exists and is public. `HUB_ERRORS` of
            huggingface_hub pass through.
    """
    api = HfApi()
    # None: as the owner's account has it. True does nothing to a repository that exists.
    api.create_repo(plan.repo, private=True if plan.private else None, exist_ok=True)
    if plan.private and not api.model_info(plan.repo).private:
        raise SimPOError(
            f"{plan.repo} exists and is public, so nothing was sent: --private applies to new "
            "repositories only; make it private in its settings on the Hub, or leave --private out"
        )
    if plan.revision is not None and not plan.revision.startswith("refs/"):
        api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
    operations = [
        CommitOperationAdd(e.name, str(folder / e.name) if e.content is None else e.content)
        for e in plan.files
    ]
    commit = api.create_commit(
        plan.repo, operations, commit_message=message, revision=plan.revision
    )
    return str(commit.commit_url)


def hub_error(error: Exception, plan: Push) -> SimPOError:
    """Return an error that says what the user can do about one of `HUB_ERRORS`."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HUB_ERRORS):
        error = error.__cause__  # the outer one says only that an upload failed
    begin, login = f"{plan.repo} cannot be sent: ", "log in with `hf auth login`"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return SimPOError(f"{begin}the Hub does not know who you are; {login}")
    if isinstance(error, UnicodeEncodeError):  # of a header; the message shows part of it
        return SimPOError(f"{begin}the token is not plain text; {login}")
    if isinstance(error, OfflineModeIsEnabled):
        return SimPOError(f"{begin}HF_HUB_OFFLINE is set; unset it")
    if isinstance(error, RevisionNotFoundError):
        return SimPOError(f"{begin}there is no revision {plan.revision!r}; name a branch")
    if status == 403 or isinstance(error, RepositoryNotFoundError):
        return SimPOError(
            f"{begin}your token has no write access there; {login} with a token that has, or name "
            "another repository"
        )
    if isinstance(error, HfHubHTTPError):
        reason = redacted_line(error.server_message or "no reason given")
        return SimPOError(f"{begin}the Hub answered {status}: {reason}; fix this and push again")
    if isinstance(error, TransportError | ConnectionError | TimeoutError):
        return SimPOError(
            f"{begin}no connection to the Hub ({type(error).__name__}); check the network and "
            "push again"
        )
    reason = redacted_line(str(error) or type(error).__name__)
    return SimPOError(f"{begin}{reason}; fix this and push again")


def redacted_line(text: str) -> str:
    """Return a message on one line of at most 300 characters, with nothing like a token in it.

    A server, a proxy or a library may repeat a token in its message.
    """
    return redacted(one_line(text))[:300]
