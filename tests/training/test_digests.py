"""Every flipped bit of a checkpoint is noticed; the step before is used."""

import json
import random
import shutil
import subprocess

import jax
import numpy as np
import pytest

from babel_jax.errors import BadInput
from babel_jax.recipe.integrity import verify_folder
from babel_jax.training.deepening import Depth
from babel_jax.training.run import train_stages
from babel_jax.training.run_state import Checkpoints


@pytest.fixture(scope="module")
def trained(run_config, begin, tmp_path_factory):
    """A run with the checkpoints 9 and 10, and a function that restores from a folder of checkpoints as that
    run would.
    """
    folder = tmp_path_factory.mktemp("trained")
    config = run_config(folder)
    seen = []
    with pytest.MonkeyPatch.context() as patch:

        def spy(self, abstract, restore=Checkpoints.restore):
            seen.append((self._model_after, abstract))
            return restore(self, abstract)

        patch.setattr(Checkpoints, "restore", spy)
        train_stages(
            config,
            [Depth(0, config.model.shape, ())],
            lambda: begin(config.model.shape),
            folder,
            lambda *_: None,
        )
    model_after, abstract = seen[0]

    def restore(checkpoints):
        with Checkpoints(checkpoints, model_after, 2, None) as opened:
            return opened.restore(abstract)

    return folder / "checkpoints", restore


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file() and path.name != "commit_success.txt")


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.slow
def test_any_flipped_bit_sets_the_step_aside(trained, tmp_path, caplog):
    checkpoints, restore = trained
    step, stage, _ = restore(checkpoints)
    assert (step, stage) == (10, "second")
    _, _, before = restore(
        shutil.copytree(checkpoints, tmp_path / "nine", ignore=shutil.ignore_patterns("10"))
    )
    draw = random.Random(0)
    files = files_of(checkpoints / "10")
    for number in range(40):
        file = files[number % len(files)]
        copy = shutil.copytree(checkpoints, tmp_path / str(number))
        damaged = copy / file.relative_to(checkpoints)
        content = damaged.read_bytes()
        # Time stamps of Orbax's metadata are of no consequence; what is noted beside the state is.
        first = content.find(b'"custom_metadata"') * 8 if file.name == "_CHECKPOINT_METADATA" else 0
        flip(damaged, draw.randrange(first, 8 * len(content)))
        caplog.clear()
        step, stage, found = restore(copy)
        assert step == 9, file
        assert (copy / "10.damaged").is_dir()
        assert "checkpoint 10 cannot be read" in caplog.text
        assert "it is set aside, and step 9 is taken" in caplog.text
        shutil.rmtree(copy)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(before))


@pytest.mark.parametrize("damage", ["cut", "gone", "more", "emptied", "lists gone"])
def test_files_that_are_cut_gone_or_added(trained, tmp_path, damage):
    checkpoints, restore = trained
    copy = shutil.copytree(checkpoints, tmp_path / "copy")
    folder = copy / "10" / "default"
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    match damage:
        case "cut":
            largest.write_bytes(largest.read_bytes()[:-1])
        case "gone":
            largest.unlink()
        case "more":
            (folder / "d" / "0123").write_bytes(b"x")
        case "emptied":
            (folder / "SHA256SUMS").write_bytes(b"")
        case "lists gone":
            for file in folder.glob("SHA256SUMS*"):
                file.unlink()
    assert restore(copy)[0] == 9


def test_changed_metadata_are_damage_and_not_another_model(trained, tmp_path):
    checkpoints, restore = trained
    copy = shutil.copytree(checkpoints, tmp_path / "copy")
    for step in ("9", "10"):
        file = copy / step / "_CHECKPOINT_METADATA"
        text = file.read_text()
        assert text.count('"hidden_size": 32') == 1
        file.write_text(text.replace('"hidden_size": 32', '"hidden_size": 33'))
    with pytest.raises(
        BadInput,
        match=r"no checkpoint can be read \(steps 10, 9: .*_CHECKPOINT_METADATA: not as it was written\)",
    ):
        restore(copy)


def test_checkpoints_of_versions_without_digests_are_read(trained, tmp_path, caplog):
    checkpoints, restore = trained
    copy = shutil.copytree(checkpoints, tmp_path / "copy")
    for file in copy.rglob("SHA256SUMS*"):
        file.unlink()
    for file in copy.glob("*/_CHECKPOINT_METADATA"):
        noted = json.loads(file.read_text())
        del noted["custom_metadata"]["sha256"], noted["custom_metadata"]["languages"]
        file.write_text(json.dumps(noted))
    caplog.set_level("INFO", "babel")
    assert restore(copy)[0] == 10
    assert (
        "checkpoint 10 is of an earlier version, without digests of its files; it is taken unchecked"
        in caplog.text
    )


def test_verify_checks_a_run_folder(trained, tmp_path):
    checkpoints, _ = trained
    run = shutil.copytree(checkpoints.parent, tmp_path / "run")
    found = verify_folder(run)
    assert found["files"] == sum(len(files_of(run / "checkpoints" / step)) - 3 for step in ("9", "10"))
    # What changes while a run goes on has none, and is named.
    assert "metrics.jsonl" in found["without_digests"]
    assert not [name for name in found["without_digests"] if name.startswith("checkpoints/")]
    flip(run / "checkpoints" / "9" / "default" / "manifest.ocdbt", 77)
    file = run / "checkpoints" / "10" / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"stage": "second"', '"stage": "first"'))
    with pytest.raises(BadInput) as refused:
        verify_folder(run)
    assert "2 damaged: checkpoints/10 (" in str(refused.value)
    assert "checkpoints/9/default/manifest.ocdbt (not the bytes that were written)" in str(refused.value)


def test_the_lists_are_those_of_sha256sum(trained):
    checkpoints, _ = trained
    folder = checkpoints / "10" / "default"
    lists = sorted(path.name for path in folder.glob("SHA256SUMS*"))
    assert lists == ["SHA256SUMS", "SHA256SUMS.process_0"]
    said = subprocess.run(
        ["sha256sum", "--check", "--strict", *lists], cwd=folder, capture_output=True, text=True
    )
    assert said.returncode == 0
    assert said.stdout.count(": OK\n") == len(files_of(folder)) - len(lists)
