"""The stand-in hub is a hub to the real clients: huggingface_hub and datasets."""

import io
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def parquet(texts):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    return file.getvalue()


def test_a_snapshot_comes_from_the_hub_and_its_storage(hub, tmp_path):
    weights = bytes(range(256)) * 100
    sha = hub.put("me/model", {"config.json": "{}", "model.safetensors": weights, "sub/a.txt": "a"})
    folder = tmp_path / "hub-cache" / "models--me--model" / "snapshots" / sha
    assert huggingface_hub.snapshot_download("me/model", token="hf_reader") == str(folder)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "sub" / "a.txt").read_text() == "a"
    large = [request for request in hub.requests if request.host == "storage"]
    assert [request.sent for request in large] == [len(weights)]
    # The key is for the hub alone.
    assert not any(request.has_key for request in large)
    assert all(request.has_key for request in hub.requests if request.host == "hub")


def test_revisions_and_listings_of_several_pages(hub):
    files = {f"data/{number:04}.txt": str(number) for number in range(2500)}
    old = hub.put("me/data", files, kind="datasets")
    hub.put("me/data", {"a.txt": "new"}, kind="datasets")
    api = HfApi()
    listed = list(api.list_repo_tree("me/data", recursive=True, revision=old, repo_type="dataset"))
    assert sorted(entry.path for entry in listed if entry.path != "data") == sorted(files)
    assert hub.count(f"/api/datasets/me/data/tree/{old}") == 3
    assert [entry.path for entry in api.list_repo_tree("me/data", repo_type="dataset")] == ["a.txt"]
    system = huggingface_hub.HfFileSystem()
    assert len(system.glob(f"datasets/me/data@{old}/data/00*.txt")) == 100
    assert system.cat_file(f"datasets/me/data@{old}/data/2499.txt", start=1, end=3) == b"49"


def test_datasets_streams_a_configuration(hub):
    card = "---\nconfigs:\n- config_name: sw\n  data_files: sw/*.parquet\n---\n"
    files = {"README.md": card, "sw/0.parquet": parquet(["a", "b"]), "sw/1.parquet": parquet(["c"])}
    hub.put("me/text", files, kind="datasets")
    rows = datasets.load_dataset("me/text", "sw", split="train", streaming=True)
    assert [row["text"] for row in rows] == ["a", "b", "c"]


def test_what_is_refused(hub):
    hub.put("me/model", {"config.json": "{}"})
    hub.put("me/gated", {"config.json": "{}"}, gated=True)
    hub.put("me/private", {"config.json": "{}"}, private=True)
    api = HfApi()
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/none")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/private")
    assert api.model_info("me/private", token="hf_reader").private
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/model", revision="v9")
    with pytest.raises(EntryNotFoundError):
        huggingface_hub.hf_hub_download("me/model", "none.json")
    for token, status in ((False, 401), ("hf_reader", 403)):
        with pytest.raises(GatedRepoError) as refusal:
            huggingface_hub.hf_hub_download("me/gated", "config.json", token=token)
        assert refusal.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("me/model", token="hf_wrong")
    assert [model.id for model in api.list_models(search="ate")] == ["me/gated"]


@pytest.mark.parametrize("part_bytes", [None, 40_000])
def test_a_commit_with_large_files_in_one_or_several_parts(hub, part_bytes):
    hub.part_bytes = part_bytes
    api = HfApi(token="hf_writer")
    api.create_repo("writer/new", private=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token="hf_reader").create_repo("writer/other")
    weights = bytes(range(256)) * 400
    additions = [CommitOperationAdd("model.safetensors", weights), CommitOperationAdd("README.md", b"# New")]
    sha = api.create_commit("writer/new", additions, commit_message="new").oid
    repo = hub.repos["models", "writer/new"]
    assert repo.private
    assert repo.files(sha)["model.safetensors"] == weights
    assert repo.files("main")["README.md"] == b"# New"
    # The same content is not sent again.
    sent = hub.count(method="PUT")
    api.create_commit("writer/new", [CommitOperationAdd("again.safetensors", weights)], commit_message="x")
    assert hub.count(method="PUT") == sent


def test_faults(hub, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.put("me/model", {"model.safetensors": b"x" * 100_000})
    hub.fail("/api/models/me/model/tree/*", status=429, times=2, headers={"Retry-After": "7"})
    hub.fail("/files/*", cut_after=60_000)
    folder = Path(huggingface_hub.snapshot_download("me/model", max_workers=1))
    # huggingface_hub waits as long as the hub says (and a second), and asks again for a file that was cut.
    assert waits == [8.0, 8.0, 1]
    assert [request.sent for request in hub.seen("/files/*")] == [60_000, 100_000]
    assert (folder / "model.safetensors").stat().st_size == 100_000
