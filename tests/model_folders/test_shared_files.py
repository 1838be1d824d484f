"""Safetensors files that a new folder takes over as they are: cloned or linked where the disk can, never
written to.
"""

import shutil

import pytest
from safetensors.numpy import load_file, save_file

from babel_jax.expansion.folders import expand_folder
from babel_jax.expansion.plan import plan_from_json
from babel_jax.files import link_file, share_file
from babel_jax.model_folders import safetensors_files
from babel_jax.model_folders.folder import Format
from babel_jax.model_folders.transfer import convert, transfer


@pytest.fixture
def source(tmp_path, write_model):
    """Four files: of layer 0, 1, 2, and of what is outside of them."""
    source = write_model(tmp_path / "source", shards=1)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    files = {}
    for number, part in enumerate([*(f"model.layers.{layer}." for layer in range(3)), ""], 1):
        chosen = {name: tensors.pop(name) for name in list(tensors) if name.startswith(part)}
        name = f"model-{number:05d}-of-00004.safetensors"
        save_file(chosen, source / name, metadata={"format": "pt"})
        files |= dict.fromkeys(chosen, name)
    (source / "model.safetensors.index.json").write_text(
        f'{{"weight_map": {str(files).replace(chr(39), chr(34))}}}'
    )
    return source


def inodes(folder):
    return {file.stat().st_ino for file in folder.glob("*.safetensors")}


def plan(*sources):
    return plan_from_json({"layers": [{"source": source} for source in sources]}, "test")


@pytest.fixture
def clones_unsupported(monkeypatch):
    """Clones are new files with the same contents, so links are what can be seen in any file system: all
    calls here ask for them.
    """

    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr("babel_jax.files.fcntl.ioctl", refuse)
    monkeypatch.setitem(transfer.__kwdefaults__, "hard_links", True)


def test_files_of_tensors_that_stay_are_linked_and_others_copied(
    tmp_path, source, read_bits, clones_unsupported
):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    expand_folder(source, tmp_path / "linked", plan(0, 1, 1, 2), verify=True)
    expand_folder(source, tmp_path / "copied", plan(0, 1, 1, 2), share=False)
    assert read_bits(tmp_path / "linked") == read_bits(tmp_path / "copied")
    # Layers 0 and 1 and what is outside keep their names; layer 2 becomes layer 3.
    assert len(inodes(tmp_path / "linked") & inodes(source)) == 3
    assert not inodes(tmp_path / "copied") & inodes(source)
    convert(source, tmp_path / "same", Format.HF)
    assert inodes(tmp_path / "same") == inodes(source)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_a_layer_that_is_changed_where_it_stands_is_not_linked(
    tmp_path, source, read_bits, clones_unsupported
):
    scaled = plan_from_json(
        {"layers": [{"source": 0}, {"source": 1, "output_scale": 0.5}, {"source": 2}]}, "test"
    )
    expand_folder(source, tmp_path / "scaled", scaled, verify=True)
    assert len(inodes(tmp_path / "scaled") & inodes(source)) == 3
    changed = [
        name for name, bits in read_bits(tmp_path / "scaled").items() if bits != read_bits(source)[name]
    ]
    assert sorted(changed) == [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ]


def test_where_the_disk_can_do_neither_files_are_copied(tmp_path, source, read_bits, monkeypatch):
    monkeypatch.setattr(safetensors_files, "share_file", lambda *_: False)
    expand_folder(source, tmp_path / "deeper", plan(0, 1, 1, 2), verify=True)
    assert not inodes(tmp_path / "deeper") & inodes(source)
    assert (
        read_bits(tmp_path / "deeper")["model.layers.2.mlp.up_proj.weight"]
        == read_bits(source)["model.layers.1.mlp.up_proj.weight"]
    )


def test_going_on_after_a_kill_never_writes_into_the_source(
    tmp_path, source, read_bits, clones_unsupported, monkeypatch
):
    """Killed between the link and the note of it, or while it is copied because there are no links."""
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    for step in ("share", "stream"):
        final = tmp_path / f"deeper-{step}"
        with monkeypatch.context() as patch:
            name = (
                "babel_jax.new_folders.Progress.add"
                if step == "share"
                else "babel_jax.model_folders.transfer.stream"
            )
            real = safetensors_files.TensorFiles.share

            def stop(*_, **__):
                raise KeyboardInterrupt

            def share(self, done, patch=patch, name=name, real=real):
                found = real(self, done)
                patch.setattr(name, stop)
                return found

            patch.setattr(safetensors_files.TensorFiles, "share", share)
            patch.setattr("babel_jax.new_folders._remove", lambda _: None)  # a kill removes nothing
            with pytest.raises(KeyboardInterrupt):
                expand_folder(source, final, plan(0, 1, 1, 2))
        expand_folder(source, final, plan(0, 1, 1, 2), verify=True)
        assert (
            read_bits(final)["model.layers.3.mlp.up_proj.weight"]
            == read_bits(source)["model.layers.2.mlp.up_proj.weight"]
        )
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_links_of_which_a_kill_noted_a_part_are_made_anew(
    tmp_path, source, read_bits, clones_unsupported, monkeypatch
):
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in source.iterdir()}
    with monkeypatch.context() as patch:
        real = safetensors_files.TensorFiles.share

        def share(self, done):
            real(self, done)
            raise KeyboardInterrupt

        patch.setattr(safetensors_files.TensorFiles, "share", share)
        patch.setattr("babel_jax.new_folders._remove", lambda _: None)  # a kill removes nothing
        with pytest.raises(KeyboardInterrupt):
            expand_folder(source, tmp_path / "deeper", plan(0, 1, 1, 2))
    with open(tmp_path / "deeper.partial" / "progress.jsonl", "a") as progress:
        progress.write("model.layers.0.mlp.up_proj.weight\n")
    expand_folder(source, tmp_path / "deeper", plan(0, 1, 1, 2), verify=True)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in source.iterdir()} == before


def test_a_note_of_clones_that_a_kill_cut_counts_for_none(tmp_path, source, read_bits, monkeypatch):
    """A clone begins with the source's header, so what a header of ours said of it would be wrong."""
    file = source / "model-00001-of-00004.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "made by": "another program"})
    monkeypatch.setattr(safetensors_files, "share_file", lambda one, other: bool(shutil.copyfile(one, other)))
    with monkeypatch.context() as patch:

        def stop(*_, **__):
            raise KeyboardInterrupt

        patch.setattr("babel_jax.model_folders.transfer.stream", stop)
        with pytest.raises(KeyboardInterrupt):
            expand_folder(source, tmp_path / "deeper", plan(0, 1, 1, 2))
    progress = tmp_path / "deeper.partial" / "progress.jsonl"
    progress.write_text(progress.read_text()[:300])
    expand_folder(source, tmp_path / "deeper", plan(0, 1, 1, 2))
    expand_folder(source, tmp_path / "whole", plan(0, 1, 1, 2), share=False)
    assert read_bits(tmp_path / "deeper") == read_bits(tmp_path / "whole")


def test_a_file_without_the_format_that_transformers_wants_is_written_anew(
    tmp_path, source, clones_unsupported
):
    file = source / "model-00001-of-00004.safetensors"
    save_file(load_file(file), file)
    convert(source, tmp_path / "same", Format.HF)
    assert len(inodes(tmp_path / "same") & inodes(source)) == 3


def test_share_file_leaves_nothing_where_it_cannot(tmp_path):
    (tmp_path / "one").write_text("text")
    assert link_file(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_text() == "text"
    assert not link_file(tmp_path / "one", tmp_path / "two")
    for share in (share_file, link_file):
        assert not share(tmp_path / "absent", tmp_path / "three")
        assert not share(tmp_path / "one", tmp_path / "two")
    assert {file.name for file in tmp_path.iterdir()} == {"one", "two"}


def test_without_clones_a_source_is_copied_so_that_nothing_written_in_place_reaches_it(
    tmp_path, source, monkeypatch
):
    """An older safetensors saves in place: through a hard link it would have destroyed the source."""

    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr("babel_jax.files.fcntl.ioctl", refuse)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    convert(source, tmp_path / "same", Format.HF)
    assert not inodes(tmp_path / "same") & inodes(source)
    for file in (tmp_path / "same").iterdir():
        with open(file, "r+b") as written:
            written.write(b"damage")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    convert(source, tmp_path / "linked", Format.HF, hard_links=True)
    assert inodes(tmp_path / "linked") == inodes(source)
