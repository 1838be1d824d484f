"""Folders being made: whose they are, two processes at one name, and disks without what others have."""

import errno
import fcntl
import os

import pytest

from babel_jax import files, new_folders
from babel_jax.errors import BadInput
from babel_jax.files import preallocate, write_text
from babel_jax.new_folders import Progress, Unverified, new_folder, resumable_folder


def fill(final, fingerprint="print"):
    with resumable_folder(final, fingerprint) as (partial, progress):
        (partial / "file").write_text("mine")
        progress.add(["file"])


def test_a_partial_folder_that_is_not_ours_is_left_as_it_is(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis").write_text("years of work")
    with pytest.raises(BadInput, match="out.partial: not begun by this program"):
        fill(tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis").read_text() == "years of work"


def test_nothing_is_wiped_or_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "progress.jsonl").write_text("print\n")
    (victim / "file").write_text("theirs")
    (tmp_path / "out.partial").symlink_to(victim)
    with pytest.raises(BadInput, match="not begun by this program"):
        fill(tmp_path / "out")
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "progress.jsonl").symlink_to(victim / "file")
    with pytest.raises(BadInput, match="not begun by this program"):
        fill(tmp_path / "out")
    (tmp_path / "text.partial").symlink_to(victim / "file")
    write_text(tmp_path / "text", "mine")
    assert (tmp_path / "text").read_text() == "mine"
    assert not (tmp_path / "text").is_symlink()
    (tmp_path / "final").symlink_to(victim)
    with pytest.raises(BadInput, match="exists already"):
        fill(tmp_path / "final")
    assert {file.name: file.read_text() for file in victim.iterdir()} == {
        "progress.jsonl": "print\n",
        "file": "theirs",
    }


def test_the_lock_holds_until_the_folder_has_its_name(tmp_path, monkeypatch):
    final, seen = tmp_path / "out", []

    def another_comes(partial, final, move=new_folders._move_into_place):
        with pytest.raises(BadInput, match="another process is writing it"):
            Progress(partial, "print")
        move(partial, final)
        seen.append(True)

    monkeypatch.setattr(new_folders, "_move_into_place", another_comes)
    fill(final)
    assert seen == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in final.iterdir()] == ["file"]


def test_a_process_that_waited_between_looking_and_locking_does_not_wipe_the_finished_folder(
    tmp_path, monkeypatch
):
    """It has opened the mark of the folder that another process then gave its name."""
    final, real = tmp_path / "out", fcntl.flock

    def finish_first(file, flags):
        monkeypatch.setattr(new_folders.fcntl, "flock", real)
        fill_by_rename(final)
        return real(file, flags)

    def fill_by_rename(final):
        (tmp_path / "out.partial" / "file").write_text("done")
        (tmp_path / "out.partial").rename(final)
        (final / "progress.jsonl").unlink()

    monkeypatch.setattr(new_folders.fcntl, "flock", finish_first)
    with pytest.raises(BadInput, match="another process has just made it"):
        fill(final)
    assert (final / "file").read_text() == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    def make_both():
        with new_folder(tmp_path / "out") as partial:
            (partial / "file").write_text("mine")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("theirs")

    with pytest.raises(BadInput, match="appeared while it was made"):
        make_both()
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    with new_folder(tmp_path / "out") as alive:
        dead = alive.with_name(f"out.{'0' * 16}.partial")
        dead.mkdir()
        (dead / "progress.jsonl").write_text("")
        other = alive.with_name(f"out.{'1' * 16}.partial")
        other.mkdir()
        (other / "thesis").write_text("not ours")
        with new_folder(tmp_path / "out") as second:
            (second / "file").write_text("second")
        assert alive.is_dir()
        assert not dead.exists()
        assert (other / "thesis").exists()
        (tmp_path / "out").rename(tmp_path / "second")
        (alive / "file").write_text("first")
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_a_kill_between_the_rename_and_the_end_leaves_a_whole_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            new_folders,
            "sync_folder",
            lambda folder: (_ for _ in ()).throw(KeyboardInterrupt) if folder == tmp_path else None,
        )
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_after_a_kill_between_the_rename_and_the_removal_of_the_mark_the_next_call_removes_it(tmp_path):
    fill(tmp_path / "out")
    with new_folder(tmp_path / "new") as partial:
        (partial / "file").write_text("mine")
    (tmp_path / "out" / "progress.jsonl").write_text("print\nfile\n")
    (tmp_path / "new" / "progress.jsonl").touch()
    for other in ("another\nfile\n", "printed\n"):  # a file of others, or of other work, stays
        (tmp_path / "new").joinpath("progress.jsonl").write_text(other)
        with pytest.raises(BadInput, match="exists already"):
            fill(tmp_path / "new")
        with pytest.raises(BadInput, match="exists already"), new_folder(tmp_path / "new"):
            pass
        assert (tmp_path / "new" / "progress.jsonl").read_text() == other
    (tmp_path / "new" / "progress.jsonl").write_text("")
    with pytest.raises(BadInput, match="exists already"):
        fill(tmp_path / "out")
    with pytest.raises(BadInput, match="exists already"), new_folder(tmp_path / "new"):
        pass
    for name in ("out", "new"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["file"]


def test_the_mark_goes_last_and_an_old_empty_leftover_goes(tmp_path, monkeypatch):
    def killed(path):
        raise SystemExit

    def fail():
        with new_folder(tmp_path / "out") as partial:
            (partial / "file").write_text("mine")
            monkeypatch.setattr(new_folders, "_remove_one", killed)
            raise ValueError

    with pytest.raises(SystemExit):
        fail()
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert {path.name for path in left.iterdir()} == {"file", "progress.jsonl"}
    empty = tmp_path / f"out.{'0' * 16}.partial"
    empty.mkdir()
    os.utime(empty, (1, 1))
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_verified_is_kept_and_what_is_bad_is_not(tmp_path):
    def fail(error):
        with resumable_folder(tmp_path / "out", "print") as (_, progress):
            progress.add(["a", "b", "c"])
            progress.forget(["b"])
            raise error

    partial = tmp_path / "out.partial"
    for error, kept in ((Unverified("x"), True), (BadInput("x"), False)):
        with pytest.raises(BadInput):
            fail(error)
        assert partial.exists() == kept
        if kept:
            assert (partial / "progress.jsonl").read_text() == "print\na c\n"


@pytest.mark.parametrize("name", ["x" * 250, "x" * 300])
def test_names_that_are_too_long_are_said(tmp_path, name):
    with pytest.raises(BadInput, match="too long"):
        fill(tmp_path / name)
    with pytest.raises(BadInput, match="too long"), new_folder(tmp_path / ("x" * 300)):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF])
def test_a_file_system_without_locks_or_preallocation(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(new_folders.fcntl, "flock", refuse)
    fill(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "mine"
    if number not in (errno.ENOLCK, errno.EBADF):
        monkeypatch.setattr(files.os, "posix_fallocate", refuse)
        with open(tmp_path / "file", "w+b") as file:
            preallocate(file, 100)
        assert (tmp_path / "file").stat().st_size == 100


def test_a_write_that_fails_leaves_nothing_and_a_leftover_goes_in_time(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", refuse)
        with pytest.raises(BadInput, match="no space left"):
            write_text(tmp_path / "text", "mine")
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.partial").write_text("left")
    os.utime(tmp_path / "text.partial", (1, 1))
    write_text(tmp_path / "text", "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
