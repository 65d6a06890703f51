"""Pushing, with the methods of HfApi replaced: what is sent, where to, and what errors say."""

import argparse
import inspect
import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.shared_folders import (
    card_data,
    every_kind,
    peft_folder,
    run_copy,
    training_record,
    whole_folder,
    write_json,
    write_weights,
)
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlx_simpo import SimPOError
from mlx_simpo.cli.main import run_command
from mlx_simpo.cli.push import add as add_push
from mlx_simpo.hub.card import MARK
from mlx_simpo.hub.push import TransportError, push  # type: ignore[attr-defined]

REPO = "ann/tiny-simpo"
TOKEN = "hf_plantedSecretToken0123456789"


class FakeHub:
    """Stands in for HfApi; ``fails``: the error that one of its methods raises."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.sent: dict[str, bytes] = {}
        self.is_private = False
        self.fails: dict[str, Exception] = {}

    def take(self, name: str, repo: str, **options: Any) -> None:
        self.calls.append((name, {"repo": repo, **options}))
        if name in self.fails:
            raise self.fails[name]

    def create_repo(self, api: HfApi, repo: str, **options: Any) -> None:
        self.take("create_repo", repo, **options)

    def create_branch(self, api: HfApi, repo: str, **options: Any) -> None:
        self.take("create_branch", repo, **options)

    def model_info(self, api: HfApi, repo: str) -> SimpleNamespace:
        self.take("model_info", repo)
        return SimpleNamespace(private=self.is_private)

    def create_commit(
        self, api: HfApi, repo: str, operations: list, **options: Any
    ) -> SimpleNamespace:
        self.take("create_commit", repo, **options)
        for operation in operations:
            with operation.as_file() as file:
                assert operation.path_in_repo not in self.sent
                self.sent[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/abc")

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def checked(real: Callable, fake: Callable) -> Callable:
    """``fake`` for arguments that ``real`` accepts too."""
    signature = inspect.signature(real)

    def call(api: HfApi, *args: Any, **options: Any) -> Any:
        signature.bind(api, *args, **options)
        return fake(api, *args, **options)

    return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    for name in ("create_repo", "create_branch", "model_info", "create_commit"):
        monkeypatch.setattr(HfApi, name, checked(getattr(HfApi, name), getattr(fake, name)))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return fake


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may reach for the network."""

    def fail(*arguments: Any) -> None:
        raise AssertionError(f"the network was reached for: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


def refusal(folder: object, repo: str = REPO, **options: Any) -> str:
    with pytest.raises(SimPOError) as caught:
        push(str(folder), repo, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


# --- what is sent -----------------------------------------------------------------------------

SENT = {
    "run": {
        "adapters.safetensors",
        "adapter_config.json",
        "chat_template.jinja",
        "summary.json",
        "metrics.jsonl",
    },
    "peft": {"adapter_model.safetensors", "adapter_config.json", "mlx_simpo.json"},
    "transformers": {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "mlx_simpo.json",
    },
}
SENT["mlx"] = SENT["transformers"]


def test_each_kind_sends_its_files_in_one_commit(
    adapter: Path, tmp_path: Path, hub: FakeHub
) -> None:
    for kind, folder in every_kind(adapter, tmp_path).items():
        hub.calls, hub.sent = [], {}
        before = snapshot(folder.path)
        result = push(folder.path, REPO)
        assert result.kind == kind
        assert hub.sent.keys() == SENT[kind] | {"README.md"}
        assert hub.names == ["create_repo", "create_commit"]
        assert hub.calls[0][1] == {"repo": REPO, "private": None, "exist_ok": True}
        assert hub.calls[1][1]["revision"] is None
        assert result.url == f"https://huggingface.co/{REPO}/commit/abc"
        assert {e.name: e.size for e in result.files} == {n: len(b) for n, b in hub.sent.items()}
        assert hub.sent["README.md"].decode() == result.card
        assert card_data(ModelCard(result.card)).library_name
        assert snapshot(folder.path) == before


def test_files_that_are_not_listed_stay(adapter: Path, tmp_path: Path, hub: FakeHub) -> None:
    folder = run_copy(adapter, tmp_path / "run")
    planted = {
        "quarantined.jsonl",
        ".env",
        ".DS_Store",
        "optimizer.safetensors",
        "optimizer.pt",
        "training_args.bin",
        "rng_state_0.pth",
        "notes.txt",
        "prompts.jsonl",
        "0000100_adapters.safetensors",
        "adapters.safetensors.bak",
    }
    for name in planted:
        (folder / name).write_bytes(pickle.dumps("private"))
    for inner in ("best", ".cache", "checkpoint-10", "__pycache__"):
        (folder / inner).mkdir()
        (folder / inner / "adapters.safetensors").write_bytes(b"private")
    result = push(folder, REPO)
    assert hub.sent.keys() == SENT["run"] | {"README.md"}
    stays = dict(result.stays)
    assert stays.keys() == planted | {
        "config.yaml",
        "best",
        ".cache",
        "checkpoint-10",
        "checkpoints",
        "__pycache__",
    }
    assert stays["quarantined.jsonl"] == "may hold private text"
    assert stays["optimizer.pt"] == "state of a training"
    assert b"private" not in b"".join(hub.sent.values())


def test_local_paths_are_cut_on_the_way(tmp_path: Path, hub: FakeHub) -> None:
    deep = "/home/ann/secret-client/llama"
    recorded = training_record(base={"model": deep})
    recorded["training"]["config"]["data"]["train"] = f"{deep}/pairs.jsonl"
    recorded["training"]["config"]["output"] = "../secret-client/mine"
    folder = peft_folder(tmp_path / "peft", recorded, base=deep)
    result = push(folder, REPO)
    assert b"secret-client" not in b"".join(hub.sent.values())
    config = json.loads(hub.sent["adapter_config.json"])
    assert config == {
        "peft_type": "LORA",
        "base_model_name_or_path": "llama",
        "r": 16,
        "lora_alpha": 32,
    }
    sent = json.loads(hub.sent["mlx_simpo.json"])
    assert sent["training"]["config"]["data"]["train"] == "pairs.jsonl"
    assert sent["training"]["config"]["objective"] == recorded["training"]["config"]["objective"]
    assert {e.name for e in result.files if e.note == "local paths cut"} == {
        "adapter_config.json",
        "mlx_simpo.json",
    }


def test_a_run_sends_no_path(adapter: Path, hub: FakeHub) -> None:
    push(adapter, REPO)
    for name, content in hub.sent.items():
        assert str(adapter.parent).encode() not in content, name
    own = json.loads((adapter / "adapter_config.json").read_text())
    sent = json.loads(hub.sent["adapter_config.json"])
    named = {"model": None, "mlx_simpo": None}  # these two hold paths
    assert own | named == sent | named
    record = own["mlx_simpo"], sent["mlx_simpo"]
    assert [r["base"]["model"] for r in record] == [own["model"], Path(own["model"]).name]
    assert record[0]["config"]["lora"] == record[1]["config"]["lora"]


def test_a_model_in_several_files(tmp_path: Path, hub: FakeHub) -> None:
    folder = whole_folder(tmp_path / "model", "mlx")
    (folder / "model.safetensors").unlink()
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for part in parts:
        write_weights(folder / part, "mlx")
    index = {"weight_map": {"a": parts[0], "b": parts[1]}}
    write_json(folder / "model.safetensors.index.json", index)
    push(folder, REPO)
    assert {*parts, "model.safetensors.index.json"} <= hub.sent.keys()
    (folder / parts[1]).unlink()
    assert f"names {parts[1]}, which is not there" in refusal(folder)


def test_the_users_card_goes_as_it_is(tmp_path: Path, hub: FakeHub) -> None:
    folder = peft_folder(tmp_path / "peft", training_record())
    (folder / "README.md").write_text("# Mine, with ümläuts\n", encoding="utf-8")
    result = push(folder, REPO)
    assert hub.sent["README.md"].decode() == result.card == "# Mine, with ümläuts\n"
    assert result.files[-1].note == "as you wrote it"


def test_a_generated_card_is_replaced(tmp_path: Path, hub: FakeHub) -> None:
    folder = peft_folder(tmp_path / "peft", training_record())
    (folder / "README.md").write_text(f"{MARK}\nold", encoding="utf-8")
    push(folder, REPO)
    assert b"\nold" not in hub.sent["README.md"]
    assert (folder / "README.md").read_text(encoding="utf-8") == f"{MARK}\nold"


# --- where to --------------------------------------------------------------------------------


def test_a_private_repository(tmp_path: Path, hub: FakeHub) -> None:
    hub.is_private = True
    push(peft_folder(tmp_path / "peft"), REPO, private=True, message="First")
    assert hub.calls[0][1]["private"] is True
    assert hub.calls[-1][1]["commit_message"] == "First"


def test_nothing_private_goes_to_a_public_repository(tmp_path: Path, hub: FakeHub) -> None:
    """create_repo does not change a repository that exists."""
    message = refusal(peft_folder(tmp_path / "peft"), private=True)
    assert "exists and is public" in message
    assert "create_commit" not in hub.names


def test_a_branch_is_created(tmp_path: Path, hub: FakeHub) -> None:
    result = push(peft_folder(tmp_path / "peft"), REPO, revision="v2")
    assert hub.calls[1] == ("create_branch", {"repo": REPO, "branch": "v2", "exist_ok": True})
    assert hub.calls[2][1]["revision"] == "v2"
    assert 'revision="v2"' in result.card


def test_a_pull_request_is_not_created_as_a_branch(tmp_path: Path, hub: FakeHub) -> None:
    push(peft_folder(tmp_path / "peft"), REPO, revision="refs/pr/1")
    assert hub.names == ["create_repo", "create_commit"]


@pytest.mark.parametrize(
    "repo", ["", "a/b/c", "ann/with space", "ann/x--y", "-ann/x", "ann/x.git", "ann/ü", "alone"]
)
def test_invalid_names_of_repositories(repo: str, tmp_path: Path, hub: FakeHub) -> None:
    message = refusal(peft_folder(tmp_path / "peft"), repo)
    assert message.startswith(f"the repository is {repo!r}; it must be owner/name")
    assert hub.calls == []


@pytest.mark.parametrize("revision", ["", "a b", "-x", "x\ny", '"; import os'])
def test_invalid_names_of_branches(revision: str, tmp_path: Path, hub: FakeHub) -> None:
    with pytest.raises(SimPOError, match="it must be a branch's name"):
        push(peft_folder(tmp_path / "peft"), REPO, revision=revision)
    assert hub.calls == []


# --- what is rejected -------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "pickle", "JSON"])
def test_nothing_of_an_invalid_folder_is_sent(damage: str, tmp_path: Path, hub: FakeHub) -> None:
    """Which folders are invalid: test_folders.py, test_outgoing.py."""
    folder = tmp_path / "peft"
    if damage != "missing":
        peft_folder(folder, training_record())
    if damage == "pickle":
        (folder / "old.bin").write_bytes(b"x")
    if damage == "JSON":
        (folder / "mlx_simpo.json").write_text("{")
    assert ("old.bin" if damage == "pickle" else str(folder)) in refusal(folder)
    assert hub.calls == []


# --- the Hub's errors ------------------------------------------------------------------------


def http_error(
    status: int, kind: type[HfHubHTTPError] = HfHubHTTPError, message: str = ""
) -> Exception:
    """An error as huggingface_hub raises it for the Hub's HTTP response."""
    headers: dict[str, str] = {}
    response = SimpleNamespace(status_code=status, headers=headers, request=None)
    return kind(f"{status} with {TOKEN}", response=response, server_message=message)  # type: ignore


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


HUB_ERRORS = [
    (LocalTokenNotFoundError("none"), "hf auth login"),
    (http_error(401), "the Hub does not know who you are; log in with `hf auth login`"),
    (http_error(401, RepositoryNotFoundError), "hf auth login"),
    (http_error(403), "your token has no write access there; log in with `hf auth login`"),
    (http_error(404, RepositoryNotFoundError), "no write access there"),
    (http_error(404, RevisionNotFoundError), "there is no revision"),
    (http_error(400, message=f"bad YAML, {TOKEN}"), "the Hub answered 400: bad YAML, …"),
    (http_error(500), "the Hub answered 500: no reason given"),
    (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set; unset it"),
    (TransportError(f"Illegal header value b'Bearer {TOKEN}'"), "no connection to the Hub"),
    (ConnectionError("refused"), "no connection to the Hub (ConnectionError)"),
    (TimeoutError(), "no connection to the Hub (TimeoutError)"),
    (PermissionError(13, "denied", "x"), "denied"),
    (RuntimeError(f"uploader: Bearer {TOKEN}\nline"), "uploader: … line"),
    (ValueError(), "ValueError"),
    (UnicodeEncodeError("ascii", TOKEN, 3, 9, "x"), "the token is not plain text; log in"),
    (caused(RuntimeError("uploading"), http_error(403)), "your token has no write access there"),
    (caused(RuntimeError("uploading"), KeyError("x")), "uploading; fix this"),
]


@pytest.mark.parametrize(("error", "reason"), HUB_ERRORS, ids=lambda v: type(v).__name__)
def test_an_error_of_the_hub_is_one_line_with_a_remedy(
    error: Exception, reason: str, tmp_path: Path, hub: FakeHub
) -> None:
    folder = peft_folder(tmp_path / "peft")
    for call in ("create_repo", "create_commit"):
        hub.fails = {call: error}
        message = refusal(folder)
        assert message.startswith(f"{REPO} cannot be sent: ")
        assert reason in message


def test_an_error_of_our_own_passes_through(tmp_path: Path, hub: FakeHub) -> None:
    hub.fails["create_repo"] = KeyError("a defect")
    with pytest.raises(KeyError):
        push(peft_folder(tmp_path / "peft"), REPO)


def test_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's own offline mode, through its own client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "HF_HUB_OFFLINE is set" in refusal(peft_folder(tmp_path / "peft"))


# --- the command -----------------------------------------------------------------------------


def command(*arguments: object) -> None:
    parser = argparse.ArgumentParser(prog="mlx-simpo")
    add_push(parser.add_subparsers(required=True))
    defaults = argparse.Namespace(config=None, settings=[])
    options = parser.parse_args(["push", *map(str, arguments)], defaults)
    options.run(options)


def test_a_dry_run_shows_everything_and_changes_nothing(
    adapter: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(adapter)
    command(adapter, REPO, "--dry-run", "--private")
    out, err = capsys.readouterr()
    assert err == ""
    assert hub.calls == []
    assert snapshot(adapter) == before
    assert f"repository: {REPO}, its main branch; private" in out
    size = (adapter / "adapters.safetensors").stat().st_size
    assert f"{size:,}  adapters.safetensors" in out
    assert "config.yaml  (holds paths of this machine" in out
    assert out.endswith(push(adapter, REPO, dry_run=True).card)
    assert TOKEN not in out


def test_a_dry_run_tells_what_is_sent(adapter: Path, tmp_path: Path, hub: FakeHub) -> None:
    for folder in every_kind(adapter, tmp_path).values():
        hub.sent = {}
        planned = push(folder.path, REPO, dry_run=True)
        done = push(folder.path, REPO)
        assert planned == done._replace(url=None)


def test_json(adapter: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    command(adapter, REPO, "--dry-run", "--json")
    seen = json.loads(capsys.readouterr().out)
    assert seen["url"] is None
    assert seen["private"] is False
    names = {file["name"] for file in seen["files"]}
    assert names == SENT["run"] | {"README.md"}
    assert seen["stays"] == [
        {"name": "checkpoints", "why": "a folder"},
        {"name": "config.yaml", "why": "holds paths of this machine; the card has the settings"},
    ]
    assert "content" not in seen["files"][0]


def test_the_address_of_the_commit(
    adapter: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    command(adapter, REPO, "--revision", "v2", "--message", "Second")
    out, err = capsys.readouterr()
    assert out == f"https://huggingface.co/{REPO}/commit/abc\n"
    assert f"to {REPO}" in err
    assert TOKEN not in out + err
    assert hub.calls[-1][1]["commit_message"] == "Second"


def test_there_is_no_option_for_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("folder", REPO, "--token", TOKEN)


def test_settings_are_refused(capsys: pytest.CaptureFixture[str], hub: FakeHub) -> None:
    assert run_command(["push", "folder", "ann/x", "lora.rank=2"]) == 2
    assert capsys.readouterr().err == (
        "mlx-simpo: error: push takes no settings; leave out 'lora.rank=2'\n"
    )


def test_file_names_that_are_not_text_are_shown(
    tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "peft")
    (folder / "odd\udc80\nname").write_text("x")
    command(folder, REPO, "--dry-run")
    out = capsys.readouterr().out
    assert r"odd\udc80\nname  (not one of the files of" in out
