"""Pushing, with the Hub replaced at huggingface_hub's own calls: what is sent, and what is not."""

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
    every_kind,
    peft_folder,
    record,
    run_copy,
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
from mlx_simpo.cli.push import add as add_push
from mlx_simpo.cli.push import run as run_push
from mlx_simpo.hub.card import MARK
from mlx_simpo.hub.folders import open_folder
from mlx_simpo.hub.outgoing import UNKNOWN_BYTES, sort_files
from mlx_simpo.hub.push import TransportError, push

REPO = "ann/tiny-simpo"
TOKEN = "hf_plantedSecretToken0123456789"


class FakeHub:
    """Takes the calls of HfApi that a push makes; ``fails``: what one of them raises."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.sent: dict[str, bytes] = {}
        self.is_private = False
        self.fails: dict[str, Exception] = {}

    def take(self, name: str, repo: str, **given: Any) -> None:
        self.calls.append((name, {"repo": repo, **given}))
        if name in self.fails:
            raise self.fails[name]

    def create_repo(self, api: HfApi, repo: str, **given: Any) -> None:
        self.take("create_repo", repo, **given)

    def create_branch(self, api: HfApi, repo: str, **given: Any) -> None:
        self.take("create_branch", repo, **given)

    def model_info(self, api: HfApi, repo: str) -> SimpleNamespace:
        self.take("model_info", repo)
        return SimpleNamespace(private=self.is_private)

    def create_commit(
        self, api: HfApi, repo: str, operations: list, **given: Any
    ) -> SimpleNamespace:
        self.take("create_commit", repo, **given)
        for operation in operations:
            with operation.as_file() as file:
                assert operation.path_in_repo not in self.sent
                self.sent[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/abc")

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def checked(real: Callable, fake: Callable) -> Callable:
    """``fake``, for arguments that ``real`` takes too."""
    signature = inspect.signature(real)

    def call(api: HfApi, *args: Any, **given: Any) -> Any:
        signature.bind(api, *args, **given)
        return fake(api, *args, **given)

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

    def refuse(*given: Any) -> None:
        raise AssertionError(f"the network was reached for: {given}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


def refusal(folder: object, repo: str = REPO, **given: Any) -> str:
    with pytest.raises(SimPOError) as caught:
        push(str(folder), repo, **given)
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


# --- what goes -------------------------------------------------------------------------------

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
        assert ModelCard(result.card).data.library_name
        assert snapshot(folder.path) == before


def test_what_is_named_otherwise_stays(adapter: Path, tmp_path: Path, hub: FakeHub) -> None:
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
        "__pycache__",
    }
    assert stays["quarantined.jsonl"] == "may hold private text"
    assert stays["optimizer.pt"] == "state of a training"
    assert b"private" not in b"".join(hub.sent.values())


def test_local_paths_are_cut_on_the_way(tmp_path: Path, hub: FakeHub) -> None:
    deep = "/home/ann/secret-client/llama"
    recorded = record(base={"model": deep})
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


def test_tokens_that_look_like_paths_are_left_alone(tmp_path: Path, hub: FakeHub) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    tokens = {"0": {"content": "/no_think"}}
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": tokens,
            "eos_token": "/home/x",
            "tokenizer_file": "/home/x/t.json",
        },
    )
    push(folder, REPO)
    assert json.loads(hub.sent["tokenizer_config.json"]) == {
        "added_tokens_decoder": tokens,
        "eos_token": "/home/x",
        "tokenizer_file": "t.json",
    }
    assert json.loads(hub.sent["config.json"])["_name_or_path"] == "llama"
    assert hub.sent["tokenizer.json"] == b"{}"


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
    folder = peft_folder(tmp_path / "peft", record())
    (folder / "README.md").write_text("# Mine, with ümläuts\n", encoding="utf-8")
    result = push(folder, REPO)
    assert hub.sent["README.md"].decode() == result.card == "# Mine, with ümläuts\n"
    assert result.files[-1].note == "as you wrote it"


def test_a_generated_card_is_replaced(tmp_path: Path, hub: FakeHub) -> None:
    folder = peft_folder(tmp_path / "peft", record())
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
    """create_repo takes a repository that is there as it is."""
    message = refusal(peft_folder(tmp_path / "peft"), private=True)
    assert "exists and is public" in message
    assert "create_commit" not in hub.names


def test_a_branch_is_made(tmp_path: Path, hub: FakeHub) -> None:
    result = push(peft_folder(tmp_path / "peft"), REPO, revision="v2")
    assert hub.calls[1] == ("create_branch", {"repo": REPO, "branch": "v2", "exist_ok": True})
    assert hub.calls[2][1]["revision"] == "v2"
    assert 'revision="v2"' in result.card


def test_a_pull_request_is_no_branch(tmp_path: Path, hub: FakeHub) -> None:
    push(peft_folder(tmp_path / "peft"), REPO, revision="refs/pr/1")
    assert hub.names == ["create_repo", "create_commit"]


@pytest.mark.parametrize(
    "repo", ["", "a/b/c", "ann/with space", "ann/x--y", "-ann/x", "ann/x.git", "ann/ü", "alone"]
)
def test_a_name_that_is_no_repository(repo: str, tmp_path: Path, hub: FakeHub) -> None:
    message = refusal(peft_folder(tmp_path / "peft"), repo)
    assert message.startswith(f"the repository is {repo!r}; it must be owner/name")
    assert hub.calls == []


@pytest.mark.parametrize("revision", ["", "a b", "-x", "x\ny", '"; import os'])
def test_a_name_that_is_no_branch(revision: str, tmp_path: Path, hub: FakeHub) -> None:
    with pytest.raises(SimPOError, match="it must be a branch's name"):
        push(peft_folder(tmp_path / "peft"), REPO, revision=revision)
    assert hub.calls == []


# --- what is refused -------------------------------------------------------------------------


def test_no_such_folder(tmp_path: Path, hub: FakeHub) -> None:
    assert "does not exist; name the folder" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "is a file; name the folder" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds neither an adapter" in refusal(tmp_path / "empty")
    assert hub.calls == []


def test_an_adapter_and_a_model(tmp_path: Path, hub: FakeHub) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    write_json(folder / "adapter_config.json", {})
    assert "holds a model and an adapter" in refusal(folder)


def test_pickled_weights(tmp_path: Path, hub: FakeHub) -> None:
    folder = peft_folder(tmp_path / "peft")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in refusal(folder)
    model = whole_folder(tmp_path / "model", "pt")
    (model / "model.safetensors").write_bytes(pickle.dumps({"weight": [0.0] * 100}))
    assert "safetensors" in refusal(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "X.PKL", "old.ckpt"])
def test_a_pickle_beside_the_weights(name: str, tmp_path: Path, hub: FakeHub) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    (folder / name).write_bytes(b"x")
    assert f"{name} may be a pickle" in refusal(folder)


def test_a_large_file_that_nobody_knows(tmp_path: Path, hub: FakeHub) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    with (folder / "consolidated.safetensors").open("wb") as file:
        file.truncate(UNKNOWN_BYTES + 1)
    assert "consolidated.safetensors (10,000,001 bytes) is no file of a model" in refusal(folder)


@pytest.mark.parametrize("format", ["np", "tf", ""])
def test_weights_of_an_unknown_format(format: str, tmp_path: Path, hub: FakeHub) -> None:
    assert "it must be pt (transformers) or mlx" in refusal(whole_folder(tmp_path / "m", format))


def test_weights_of_two_formats(tmp_path: Path, hub: FakeHub) -> None:
    folder = whole_folder(tmp_path / "model", "pt")
    write_weights(folder / "model-2.safetensors", "mlx")
    assert "the format mlx, pt" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[1]", "\udc80", "[" * 100_000])
@pytest.mark.parametrize("name", ["adapter_config.json", "mlx_simpo.json"])
def test_files_that_are_no_json(name: str, content: str, tmp_path: Path, hub: FakeHub) -> None:
    folder = peft_folder(tmp_path / "peft", record())
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert str(folder / name) in refusal(folder)
    assert hub.calls == []


def test_a_link_that_leads_nowhere_stays(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft")
    (folder / "tokenizer.json").symlink_to(tmp_path / "none")
    assert ("tokenizer.json", "no file of a LoRA adapter for PEFT") in sort_files(
        open_folder(folder)
    ).stays


# --- the Hub's errors ------------------------------------------------------------------------


def answered(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError, said: str = "") -> Exception:
    """An error as huggingface_hub makes it of the Hub's answer."""
    headers: dict[str, str] = {}
    response = SimpleNamespace(status_code=status, headers=headers, request=None)
    return kind(f"{status} with {TOKEN}", response=response, server_message=said)  # type: ignore


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


HUB_SAYS = [
    (LocalTokenNotFoundError("none"), "hf auth login"),
    (answered(401), "the Hub does not know who you are; log in with `hf auth login`"),
    (answered(401, RepositoryNotFoundError), "hf auth login"),
    (answered(403), "your token may not write there; log in with `hf auth login`"),
    (answered(404, RepositoryNotFoundError), "may not write there"),
    (answered(404, RevisionNotFoundError), "there is no revision"),
    (answered(400, said=f"bad YAML, {TOKEN}"), "the Hub answered 400: bad YAML, …"),
    (answered(500), "the Hub answered 500: no reason given"),
    (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set; unset it"),
    (TransportError(f"Illegal header value b'Bearer {TOKEN}'"), "no connection to the Hub"),
    (ConnectionError("refused"), "no connection to the Hub (ConnectionError)"),
    (TimeoutError(), "no connection to the Hub (TimeoutError)"),
    (PermissionError(13, "denied", "x"), "denied"),
    (RuntimeError(f"uploader: Bearer {TOKEN}\nline"), "uploader: … line"),
    (ValueError(), "ValueError"),
    (UnicodeEncodeError("ascii", TOKEN, 3, 9, "x"), "the token is not plain text; log in"),
    (caused(RuntimeError("uploading"), answered(403)), "your token may not write there"),
    (caused(RuntimeError("uploading"), KeyError("x")), "uploading; mend that"),
]


@pytest.mark.parametrize(("error", "says"), HUB_SAYS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("call", ["create_repo", "create_commit"])
def test_an_error_of_the_hub_is_one_line_with_a_remedy(
    call: str, error: Exception, says: str, tmp_path: Path, hub: FakeHub
) -> None:
    hub.fails[call] = error
    message = refusal(peft_folder(tmp_path / "peft"))
    assert message.startswith(f"{REPO} cannot be sent: ")
    assert says in message


def test_an_error_of_ours_is_not_explained_away(tmp_path: Path, hub: FakeHub) -> None:
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


def test_a_dry_run_shows_all_and_touches_nothing(
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
    assert {"name": "config.yaml", "why": seen["stays"][0]["why"]} in seen["stays"]
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


def test_no_token_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("folder", REPO, "--token", TOKEN)


def test_settings_are_refused(adapter: Path, hub: FakeHub) -> None:
    options = argparse.Namespace(config=None, settings=["lora.rank=2"])
    with pytest.raises(SimPOError, match=r"leave out 'lora\.rank=2'"):
        run_push(options)


def test_names_that_are_no_text_are_shown(
    tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "peft")
    (folder / "odd\udc80\nname").write_text("x")
    command(folder, REPO, "--dry-run")
    out = capsys.readouterr().out
    assert r"odd\udc80\nname  (no file of" in out
