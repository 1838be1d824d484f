"""Digests beside files, and the command that checks them; against sha256sum where there is something to
compare.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from babel_jax.cli import main
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import heldout_file, open_prepared
from babel_jax.digests import EarlySums, check_sums, lists_below, read_sums, write_sums
from babel_jax.errors import BadInput

NAMES = ["plain.txt", "a b.txt", "sub/deep/ü.bin", "back\\slash", "line\nend"]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    for number, name in enumerate(NAMES):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(bytes([number]) * 1000 * number)
    (made / ".hidden").write_text("x")
    write_sums(made)
    return made


def test_lists_are_those_of_sha256sum(folder):
    said = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert said.returncode == 0
    assert said.stdout.count(": OK") == len(NAMES)
    theirs = subprocess.run(["sha256sum", *NAMES], cwd=folder, capture_output=True, text=True).stdout
    (folder / "SHA256SUMS").write_text(theirs)
    checked = check_sums(lists_below(folder), folder)
    assert (checked.files, checked.bytes, checked.damaged) == (5, 10_000, {})


def test_what_is_wrong_is_told_by_file(folder, capsys):
    assert main(["verify", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["files"], found["bytes"], found["without_digests"]) == (5, 10_000, [])
    (folder / "later.txt").write_text("added")
    assert main(["verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["without_digests"] == ["later.txt"]
    # Many files of one folder are one name in the line.
    (folder / "cache").mkdir()
    for name in "abc":
        (folder / "cache" / name).write_text(name)
    assert main(["verify", str(folder)]) == 0
    assert "; 4 without digests: cache/ (3 files), later.txt" in capsys.readouterr().out
    shutil.rmtree(folder / "cache")
    (folder / "a b.txt").write_bytes(b"\1" * 999 + b"\2")
    (folder / "plain.txt").unlink()
    assert main(["verify", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "2 damaged: " in error
    assert "plain.txt (missing)" in error
    assert "a b.txt (not the bytes that were written)" in error


@pytest.mark.parametrize(
    "line",
    ["../outside", "/etc/hostname", "sub/../../outside", "sub/link"],
    ids=["above", "absolute", "above by a detour", "link"],
)
def test_a_list_does_not_lead_out_of_its_folder(folder, capsys, line):
    (folder.parent / "outside").write_text("secret")
    (folder / "sub" / "link").symlink_to(folder.parent / "outside")
    with open(folder / "SHA256SUMS", "a") as file:
        file.write(f"{'0' * 64}  {line}\n")
    assert main(["verify", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "1 damaged: " in error
    assert "not the bytes" not in error  # nothing was read there


@pytest.mark.parametrize("content", [b"", b"no digest\n", b"\xff\xfe\n", b"0" * 64 + b"  cut off"])
def test_damaged_lists(folder, capsys, content):
    (folder / "SHA256SUMS").write_bytes(content)
    assert main(["verify", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_pipes_are_not_waited_for(folder, capsys):
    (folder / "plain.txt").unlink()
    os.mkfifo(folder / "plain.txt")
    assert main(["verify", str(folder)]) == 2
    assert "plain.txt (missing)" in capsys.readouterr().err


def test_people_may_write_on_the_card(folder, capsys):
    """The tutorial asks for it; all other files keep their digests."""
    (folder / "README.md").write_text("as written")
    write_sums(folder, [*(folder / name for name in NAMES), folder / "README.md"])
    (folder / "README.md").write_text("license: mit")
    assert main(["verify", str(folder)]) == 0
    (folder / "README.md").unlink()
    assert main(["verify", str(folder)]) == 0
    capsys.readouterr()


def test_a_folder_without_digests(tmp_path, capsys):
    for path, says in ((tmp_path / "none", "no such folder"), (tmp_path, "nothing in it has digests")):
        assert main(["verify", str(path)]) == 2
        assert says in capsys.readouterr().err


def test_prepared_data(small_prepared, tmp_path, capsys):
    folder = shutil.copytree(small_prepared, tmp_path / "data")
    assert main(["verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["without_digests"] == []
    lists = [path.relative_to(folder) for path in lists_below(folder)]
    assert [str(path.parent) for path in lists] == [
        ".",
        *sorted(f"windows/{path.name}" for path in (folder / "windows").iterdir()),
    ]
    listed = {path for one in lists_below(folder) for path in read_sums(one)}
    assert {
        path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("SHA256SUMS")
    } == listed
    # Held-out text is checked wherever it is used: one letter changed would change every figure a little.
    file = heldout_file(folder, "sw")
    before = open_prepared(folder).heldout("sw")
    text = file.read_text()
    file.write_text(text.replace("a", "e", 1))
    with pytest.raises(BadInput, match=r"heldout/sw\.jsonl: not as it was written"):
        open_prepared(folder).heldout("sw")
    assert main(["verify", str(folder)]) == 2
    assert "heldout/sw.jsonl (not the bytes that were written)" in capsys.readouterr().err
    file.write_text(text)
    assert open_prepared(folder).heldout("sw") == before


def test_prepared_data_on_a_disk_that_cannot_be_written_to(
    small_settings, small_model, small_prepared, tmp_path, monkeypatch
):
    """`prepare` and training find all there: nothing is written.

    Root may write anywhere, so writing itself is forbidden here.
    """
    folder = shutil.copytree(small_prepared, tmp_path / "data")

    def fail(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    for name in ("babel_jax.files.write_bytes", "os.replace", "os.rename", "os.mkdir", "os.unlink"):
        monkeypatch.setattr(name, fail)
    report = prepare(small_settings.model_copy(update={"folder": str(folder)}), small_model)
    assert report == open_prepared(folder).report


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_model_folders(base, tmp_path, capsys, to):
    """Exported, converted and expanded ones; the list of a source is not taken for that of its copy."""
    folder = tmp_path / "converted"
    assert main(["convert", base["hf"], str(folder), "--to", to]) == 0
    assert main(["expand", base["hf"], str(tmp_path / "deeper"), "--append", "1"]) == 0
    capsys.readouterr()
    for made in (base["hf"], folder, tmp_path / "deeper"):
        assert main(["verify", str(made), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["without_digests"] == []
        # The list itself and the card are not compared.
        names = [path.name for path in Path(made).rglob("*") if path.is_file()]
        assert found["files"] == len(names) - 1 - names.count("README.md")
    weights = max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 4
    weights.write_bytes(data)
    assert main(["verify", str(folder)]) == 2
    assert f"{weights.relative_to(folder)} (not the bytes that were written)" in capsys.readouterr().err


def test_a_file_that_changes_after_its_early_digest_is_read_again(tmp_path):
    (tmp_path / "same").write_bytes(b"weights")
    (tmp_path / "changed").write_bytes(b"before")
    with EarlySums() as sums:
        sums.begin([tmp_path / "same", tmp_path / "changed"])
        (tmp_path / "changed").write_bytes(b"afterwards")
        (tmp_path / "new").write_bytes(b"config")
        write_sums(tmp_path, sum_of=sums.sum_of)
    found = read_sums(tmp_path / "SHA256SUMS")
    expected = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
    assert found == expected
    assert len(found) == 3


@pytest.mark.parametrize("gap", [False, True])
def test_a_digest_is_that_of_a_file_whose_parts_are_written_in_any_order(tmp_path, gap):
    """A run that resumes does not report the parts that were written before: the gap."""
    data = random.Random(0).randbytes(1_000_003)
    cuts = [0, 8, 9, 300_000, 300_001, 999_999, len(data)]
    parts = [*itertools.pairwise(cuts)]
    random.Random(1).shuffle(parts)
    path = tmp_path / "weights"
    with EarlySums() as sums, open(path, "wb", buffering=0) as file:
        file.truncate(len(data))
        for start, stop in parts:
            file.seek(start)
            file.write(data[start:stop])
            if not (gap and start == 9):
                sums.written(path, start, stop)
        sums.begin([path])
        assert sums.sum_of(path) == hashlib.sha256(data).hexdigest()


def test_a_digest_is_ready_before_it_is_asked_for_and_ends_with_its_command(tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    for path in (whole, half):
        path.write_bytes(b"weights")
    with EarlySums() as sums:
        sums.written(half, 0, 3)
        sums.written(whole, 3, 7)
        sums.written(whole, 0, 3)
        assert sums._growing[whole][1].result(timeout=60) == hashlib.sha256(b"weights").hexdigest()
    # Nobody waits for a file that was not finished.
    with pytest.raises(CancelledError):
        sums._growing[half][1].result(timeout=60)
