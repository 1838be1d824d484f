"""Models on the hub wherever a model folder is taken: names, revisions, the cache, and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from babel_jax.cli import main
from babel_jax.config import ModelSource
from babel_jax.errors import BadInput
from babel_jax.hub import models, patience
from babel_jax.hub.names import HubName, hub_name, hub_origin
from babel_jax.model_folders.folder import model_name, open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.transfer import convert

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen2.5-7B", HubName("Qwen/Qwen2.5-7B", None)),
        ("Qwen/Qwen2.5-7B@v1.0", HubName("Qwen/Qwen2.5-7B", "v1.0")),
        ("Qwen/Qwen2.5-7B@refs/pr/3", HubName("Qwen/Qwen2.5-7B", "refs/pr/3")),
        (f"a/b@{COMMIT}", HubName("a/b", COMMIT)),
        ("Qwen2.5-7B", None),
        ("runs/my-run/hf", None),
        ("./a/b", None),
        ("../b", None),
        ("/a/b", None),
        ("a/b/", None),
        ("a/b@", None),
        ("a--b/c", None),
        ("a/b..c", None),
        ("a/b.", None),
        ("gs://bucket/b", None),
        ("a/ש", None),
        ("", None),
    ],
)
def test_names(text, name):
    assert hub_name(text) == name
    assert name is None or str(name) == text


def test_a_local_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ModelSource(folder="runs/base").folder == "runs/base"
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert hub_name("runs/base") is None
    assert ModelSource(folder="runs/base").folder == str(tmp_path / "runs" / "base")
    # With a revision it is the hub's.
    assert hub_name("runs/base@main") == HubName("runs/base", "main")


def test_a_model_is_fetched_once_and_shares_the_cache(hub, tiny_folder, tmp_path):
    sha = hub.put("me/tiny", tiny_folder)
    hub.put("me/tiny", {"config.json": "{}"}, branch="other")
    repo = hub.repos["models", "me/tiny"]
    # Weights of other programs are not fetched.
    repo.commits[sha] |= {"pytorch_model.bin": b"x" * 1000, "original/model.safetensors": b"x" * 1000}
    folder = open_folder("me/tiny")
    assert folder.path == tmp_path / "hub-cache" / "models--me--tiny" / "snapshots" / sha
    assert {path.name for path in folder.path.iterdir()} == {path.name for path in tiny_folder.iterdir()}
    assert hub_origin(folder.path) == HubName("me/tiny", sha)
    assert model_name(folder.path) == "tiny"
    here, there = load_params(folder), load_params(open_folder(tiny_folder))
    jax.tree.map(np.testing.assert_array_equal, here, there)
    # Nothing comes twice, also not in another process.
    sent = sum(request.sent for request in hub.seen("/files/*"))
    stored_apart = [path for path in tiny_folder.iterdir() if path.suffix in (".safetensors", ".model")]
    assert sent == sum(path.stat().st_size for path in stored_apart)
    before = len(hub.requests)
    models._commit.cache_clear()
    assert open_folder(f"me/tiny@{sha}").path == folder.path
    assert len(hub.requests) == before
    open_folder("me/tiny")
    assert [request.path for request in hub.requests[before:]] == ["/api/models/me/tiny"]
    # transformers reads the same files.
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained("me/tiny", cache_dir=constants.HF_HUB_CACHE)
    assert config.num_hidden_layers == 4


def test_only_what_is_needed(hub, tiny_folder):
    hub.put("me/tiny", tiny_folder)
    assert open_folder("me/tiny", weights=False).config.num_hidden_layers == 4
    size = sum(path.stat().st_size for path in tiny_folder.glob("*.safetensors"))
    assert sum(request.sent for request in hub.requests) < size / 4


def test_a_download_that_was_cut_or_killed_is_resumed(hub, tiny_folder, tmp_path):
    """Of 12 MB, the first 10 MiB are on disk when the connection breaks; then the process is killed."""
    weights = os.urandom(12_000_000)
    sha = hub.put("me/large", {"config.json": "{}", "model.safetensors": weights})
    hub.fail("/files/*", cut_after=11_000_000)
    models.hub_model(HubName("me/large", None))
    starts = [request.byte_range for request in hub.seen("/files/*")]
    assert starts == [None, f"bytes={10 * 2**20}-"]
    blobs = tmp_path / "hub-cache" / "models--me--large" / "blobs"
    (blob,) = (path for path in blobs.iterdir() if path.stat().st_size > 1000)
    assert blob.name == hashlib.sha256(weights).hexdigest()

    # As after a kill: some of the file is there.
    blob.unlink()
    (blobs / f"{blob.name}.babel-partial").write_bytes(weights[:7_000_000])
    hub.requests.clear()
    models.hub_model(HubName("me/large", sha))
    assert [request.byte_range for request in hub.seen("/files/*")] == ["bytes=7000000-"]
    assert blob.read_bytes() == weights

    # Damaged on the way: not taken, and removed.
    blob.unlink()
    (blobs / f"{blob.name}.babel-partial").write_bytes(b"x" * 7_000_000)
    with pytest.raises(BadInput, match="other bytes of model.safetensors came"):
        models.hub_model(HubName("me/large", sha))
    models.hub_model(HubName("me/large", sha))
    assert blob.read_bytes() == weights


def test_two_threads_fetch_a_file_once(hub, tiny_folder):
    hub.put("me/tiny", tiny_folder)
    hub.fail("/files/*", seconds=0.3, times=3)
    both = [threading.Thread(target=open_folder, args=("me/tiny",)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    sizes = sorted(request.sent for request in hub.seen("/files/*"))
    assert set(sizes) >= {path.stat().st_size for path in tiny_folder.glob("*.safetensors")}
    assert len(sizes) == len(set(sizes))


def test_a_busy_hub_is_waited_for(hub, tiny_folder, monkeypatch, caplog):
    waits = []
    hub.put("me/tiny", tiny_folder)
    monkeypatch.setattr(patience, "_clock", lambda: sum(waits))
    monkeypatch.setattr(patience, "_sleep", waits.append)
    hub.fail("/api/models/me/tiny", status=429, headers={"Retry-After": "40"}, times=2)
    hub.fail("/api/models/me/tiny", status=503)
    caplog.set_level("WARNING", "babel")
    open_folder("me/tiny", weights=False)
    assert sum(waits) >= 82
    assert "me/tiny: the hub answers 429 (too many requests); next try in" in caplog.text

    models._commit.cache_clear()
    waits.clear()
    hub.fail("/api/models/me/tiny", status=429, times=10_000)
    with pytest.raises(BadInput, match=r"me/tiny: the hub has answered 429 .* for \d+ minutes; run the same"):
        open_folder("me/tiny")
    assert 3000 < sum(waits) <= 3600


def refusal(name):
    with pytest.raises(BadInput) as error:
        open_folder(name)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_is_refused(hub, tiny_folder, monkeypatch):
    hub.put("me/tiny-model", tiny_folder)
    hub.put("me/tiny-model", tiny_folder, branch="v1")
    hub.put("me/gated", tiny_folder, gated=True)
    hub.put("me/pickled", {"config.json": "{}", "pytorch_model.bin": b"x"})
    hub.put("me/nothing", {"README.md": "# Hello"})
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    half = {"config.json": "{}", "model-00001-of-00002.safetensors": b"x"}
    hub.put("me/half", {**half, "model.safetensors.index.json": json.dumps(index)})
    page = constants.ENDPOINT
    assert refusal("me/tiny-modle") == (
        "me/tiny-modle: no folder of this name here, and no such model on the hub, or a private one (then "
        "set HF_TOKEN); near: me/tiny-model"
    )
    assert refusal("nobody/nothing-near").endswith("; check the name")
    assert refusal("me/tiny-model@v2") == "me/tiny-model: has no revision 'v2'; it has main, v1"
    assert refusal("me/gated") == (
        f"me/gated: this model is gated: log in, accept its terms at {page}/me/gated, and set HF_TOKEN to a "
        "key of that account"
    )
    assert "holds no safetensors files (it has pytorch_model.bin)" in refusal("me/pickled")
    assert refusal("me/nothing").startswith("me/nothing: has no config.json")
    assert "names model-00002-of-00002.safetensors, which the hub does not have" in refusal("me/half")

    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert refusal("me/gated") == (
        f"me/gated: this model is gated: the account of HF_TOKEN has no access; ask at {page}/me/gated"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret-that-nobody-knows")
    models._commit.cache_clear()
    said = refusal("me/tiny-model")
    assert said.startswith("me/tiny-model: the hub does not know the key in HF_TOKEN")
    assert "hf_secret" not in said
    # Accepted since.
    hub.repos["models", "me/gated"].readers.add("reader")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert open_folder("me/gated").config.num_hidden_layers == 4


def test_without_a_network(hub, tiny_folder, monkeypatch):
    """What the cache has is used; what it lacks is refused in one line."""
    hub.put("me/tiny", tiny_folder)
    path = open_folder("me/tiny", weights=False).path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    models._commit.cache_clear()
    assert open_folder("me/tiny", weights=False).path == path
    said = refusal("me/tiny")
    assert said.startswith("me/tiny: HF_HUB_OFFLINE is set, and ")
    assert refusal("me/other").startswith("me/other: HF_HUB_OFFLINE is set, and ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert open_folder("me/tiny").path == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    models._commit.cache_clear()
    load_params(open_folder("me/tiny"))


def test_a_hub_that_cannot_be_reached(tmp_path):
    """In a process of its own: the address is read when huggingface_hub is imported."""
    changed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "babel_jax.cli", "generate", "me/tiny", "Habari"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | changed, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "babel: me/tiny: the hub at http://127.0.0.1:9 cannot be reached"
    )


def test_signed_addresses_are_not_shown(hub, tiny_folder, capsys):
    hub.put("me/large", {"config.json": "{}", "model.safetensors": os.urandom(200_000)})
    hub.fail("/files/*", cut_after=1000)
    main(["generate", "me/large", "Habari"])
    said = capsys.readouterr().err
    assert said.count("Error while downloading from http") == 1
    assert "secret-of-the-storage" not in said


def test_commands_take_names(hub, tiny_folder, tmp_path, capsys, monkeypatch):
    sha = hub.put("me/tiny", tiny_folder)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "me/tiny", "orbax", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "orbax"
    assert main(["expand", "me/tiny", "deeper", "--new-layers", "1", "--verify"]) == 0
    hf_config = json.loads((tmp_path / "deeper" / "config.json").read_text())
    assert hf_config["babel_expansion"]["source"] == f"me/tiny@{sha}"
    card = ModelCard.load(tmp_path / "deeper" / "README.md")
    assert card.data.base_model == "me/tiny"
    assert f"`me/tiny` at commit `{sha}`" in card.text
    capsys.readouterr()
    assert main(["generate", "me/tiny@main", "Habari", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]
    text = tmp_path / "text"
    text.mkdir()
    (text / "sw.jsonl").write_text('{"text": "Habari ya asubuhi. Habari ya jioni."}\n' * 3)
    assert main(["sensitivity", "me/tiny", "--data", "text", "--out", "s"]) == 0
    assert "Sensitivity of the layers of tiny" in (tmp_path / "s" / "sensitivity.md").read_text()
    assert main(["evaluate", "deeper", "--baseline", "me/tiny", "--data", "text", "--languages", "sw"]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["init", "--model", "me/tiny", "--data", "text", "--new-layers", "1"]) == 0
    assert 'folder = "me/tiny"' in (tmp_path / "my-run.toml").read_text()


def test_an_address_of_the_hub_is_read_by_ranges(hub, tiny_folder, tmp_path):
    """hf://OWNER/NAME keeps no copy of the weights."""
    hub.put("me/tiny", tiny_folder)
    convert("hf://me/tiny", tmp_path / "orbax")
    here, there = load_params(open_folder(tmp_path / "orbax")), load_params(open_folder(tiny_folder))
    jax.tree.map(np.testing.assert_array_equal, here, there)
    assert not (tmp_path / "hub-cache").exists()
