"""`babel push`: one commit with the card, resumed after a stop; what is not sent."""

import json
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest

from babel_jax.cli import main
from babel_jax.errors import BadInput
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.push import push_folder
from babel_jax.model_folders.transfer import convert


@pytest.fixture
def ready(tiny_folder, tmp_path, monkeypatch):
    """A folder that may be sent, and the key of `writer`."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    folder = tmp_path / "mine"
    shutil.copytree(tiny_folder, folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlibrary_name: transformers\n---\n\n# Mine\n")
    return folder


def test_a_folder_becomes_one_commit(hub, ready, capsys):
    assert main(["push", str(ready), "writer/mine", "--private", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    repo = hub.repos["models", "writer/mine"]
    assert repo.private
    # One commit of ours, after that with which the hub makes a repository.
    assert list(repo.commits)[1:] == [told["commit"]]
    assert set(repo.files("main")) == {".gitattributes", *(path.name for path in ready.iterdir())}
    here, there = load_params(open_folder(ready)), load_params(open_folder(f"writer/mine@{told['commit']}"))
    jax.tree.map(np.testing.assert_array_equal, here, there)

    # The same again: no new commit, nothing sent.
    sent = hub.count(method="PUT")
    assert main(["push", str(ready), "writer/mine"]) == 0
    said = capsys.readouterr()
    assert "has these files already" in said.out
    assert hub.count(method="PUT") == sent
    assert len(repo.commits) == 2
    assert "hf_writer" not in said.out + said.err


def test_a_branch_and_weights_of_an_earlier_model(hub, ready):
    push_folder(ready, "writer/mine")
    repo = hub.repos["models", "writer/mine"]
    stale = {"model-00009-of-00009.safetensors": b"x", "pytorch_model.bin": b"x", "notes.txt": b"kept"}
    repo.commit(repo.files("main") | stale)
    result = push_folder(ready, "writer/mine")
    assert result["removed"] == ["model-00009-of-00009.safetensors", "pytorch_model.bin"]
    assert repo.files("main")["notes.txt"] == b"kept"
    assert "model-00009-of-00009.safetensors" not in repo.files("main")
    result = push_folder(ready, "writer/mine", revision="v2")
    assert repo.refs["v2"] == result["commit"]
    assert repo.files("v2") == repo.files("main")


@pytest.mark.parametrize("part_bytes", [None, 100_000])
def test_a_stop_is_resumed(hub, ready, part_bytes, monkeypatch):
    """The second large file is refused; the same call then sends the others."""
    hub.part_bytes = part_bytes
    large = sorted(path for path in ready.iterdir() if path.name.endswith(".safetensors"))
    send = huggingface_hub.HfApi.preupload_lfs_files
    refused = []

    def second_refused(api, repo_id, additions, **options):
        if additions[0].path_in_repo == large[1].name and not refused:
            refused.append(additions[0])
            hub.fail("/upload/*" if part_bytes is None else "/part/*", status=403)
        return send(api, repo_id, additions, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", second_refused)
    with pytest.raises(BadInput, match=r"writer/mine: .*403"):
        push_folder(ready, "writer/mine")
    # Nothing is to be seen on the hub.
    assert len(hub.repos["models", "writer/mine"].commits) == 1
    assert len(hub.stored) == 1
    # A busy hub is waited for; the first file is not sent again.
    hub.fail("/writer/mine.git/info/lfs/objects/batch", status=503, times=2)
    sent = hub.count(method="PUT", status=200)
    push_folder(ready, "writer/mine")
    more = hub.count(method="PUT", status=200) - sent
    if part_bytes is None:
        assert sent == 1
        # The tokenizer's model is stored apart too.
        assert more == len(large)
    files = hub.repos["models", "writer/mine"].files("main")
    assert all(files[path.name] == path.read_bytes() for path in ready.iterdir())


def test_what_is_not_sent(hub, ready, tmp_path, monkeypatch, capsys):
    with pytest.raises(BadInput, match="no name of a model on the hub; write OWNER/NAME"):
        push_folder(ready, "mine")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(BadInput, match=r"writer/mine: the key in HF_TOKEN has no right to write there"):
        push_folder(ready, "writer/mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadInput, match="sending needs a key of the hub"):
        push_folder(ready, "writer/mine")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown-to-all")
    with pytest.raises(BadInput, match="the hub does not know the key") as refusal:
        push_folder(ready, "writer/mine")
    assert "hf_unknown" not in str(refusal.value)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")

    hub.requests.clear()
    convert(ready, tmp_path / "orbax")
    with pytest.raises(BadInput, match=r"Orbax's format.*babel convert .* --to hf"):
        push_folder(tmp_path / "orbax", "writer/mine")
    (ready / "progress.jsonl").write_text("")
    with pytest.raises(BadInput, match="not whole"):
        push_folder(ready, "writer/mine")
    (ready / "progress.jsonl").unlink()
    card = (ready / "README.md").read_text()
    (ready / "README.md").write_text("# No front matter\n")
    with pytest.raises(BadInput, match="no front matter that can be read"):
        push_folder(ready, "writer/mine")
    (ready / "README.md").unlink()
    with pytest.raises(BadInput, match="no card"):
        push_folder(ready, "writer/mine")
    (ready / "README.md").write_text(card)
    shard = next(ready.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(BadInput, match="not the bytes that were written"):
        push_folder(ready, "writer/mine")
    (ready / "SHA256SUMS").unlink()
    shard.unlink()
    with pytest.raises(BadInput):
        push_folder(ready, "writer/mine")
    assert hub.requests == []


def test_somebody_else_commits_meanwhile(hub, ready, monkeypatch):
    push_folder(ready, "writer/mine")
    (ready / "notes.txt").write_text("new")
    repo = hub.repos["models", "writer/mine"]
    info = huggingface_hub.HfApi.model_info

    def and_a_commit(api, *arguments, **options):
        told = info(api, *arguments, **options)
        repo.commit(repo.files("main") | {"other.txt": b"other"})
        return told

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", and_a_commit)
    with pytest.raises(BadInput, match="somebody else has changed it meanwhile"):
        push_folder(ready, "writer/mine")
    assert "notes.txt" not in repo.files("main")
