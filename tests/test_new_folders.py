"""Folders being made: whose they are, two processes at one name, and disks without what others have."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from babel_jax import files, lease, new_folders
from babel_jax.errors import BadInput, InUse
from babel_jax.files import preallocate, write_text
from babel_jax.new_folders import Unverified, new_folder, resumable_folder


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
        with pytest.raises(InUse, match=rf"another process is at work in it \(process {os.getpid()}\)"):
            fill(final)
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
        monkeypatch.setattr(fcntl, "flock", real)
        fill_by_rename(final)
        return real(file, flags)

    def fill_by_rename(final):
        (tmp_path / "out.partial" / "file").write_text("done")
        (tmp_path / "out.partial").rename(final)
        (final / "progress.jsonl").unlink()

    monkeypatch.setattr(fcntl, "flock", finish_first)
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

    monkeypatch.setattr(fcntl, "flock", refuse)
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


# Fills a folder on a disk without locks until its input has a line; as on another machine, if told so.
FILLER = """
import errno, fcntl, sys
from pathlib import Path
from babel_jax import lease, new_folders
def no_locks(*_):
    raise OSError(errno.ENOTSUP, "Operation not supported")
fcntl.flock = no_locks
lease.lease_in.__wrapped__.__defaults__ = (0.05, False)  # seconds
kind, final, machine, print_of = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
lease._machine = lambda real=lease._machine(): machine or real
try:
    if kind == "new":
        with new_folders.new_folder(final) as partial:
            (partial / "file").write_text(print_of)
            print("filling", flush=True)
            sys.stdin.readline()
    else:
        with new_folders.resumable_folder(final, print_of) as (partial, progress):
            print(f"filling {sorted(progress.done)}", flush=True)
            (partial / "file").write_text(print_of)
            progress.add(["file"])
            print("done", flush=True)
            sys.stdin.readline()
except lease.BadInput as error:
    print(error, flush=True)
    sys.exit(2)
"""


@pytest.fixture
def filler(tmp_path):
    """Starts a process that fills tmp_path/out, and gives it with the first line that it says."""
    begun = []

    def start(kind, machine="", print_of="print"):
        process = subprocess.Popen(
            [sys.executable, "-c", FILLER, kind, tmp_path / "out", machine, print_of],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        begun.append(process)
        return process, process.stdout.readline()

    yield start
    for process in begun:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["new", "resumable"])
@pytest.mark.parametrize("machine", ["", "another machine"])
def test_without_locks_a_second_process_is_refused_and_a_killed_one_is_followed(
    tmp_path, filler, kind, machine
):
    first, said = filler(kind)
    assert said.startswith("filling")
    second, said = filler(kind, machine, "other work")
    assert f"/out: another job is at work in it (process {first.pid} on " in said
    assert second.wait(60) == 2
    first.communicate("\n")
    assert first.returncode == 0
    assert (tmp_path / "out" / "file").read_text() == "print"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    # A killed one is followed at once on its machine, and from another one after its silence.
    (tmp_path / "out").rename(tmp_path / "before")
    first, _ = filler(kind)
    if kind == "resumable":
        assert first.stdout.readline() == "done\n"
    first.kill()
    first.wait()
    second, said = filler(kind, machine)
    assert said == ("filling\n" if kind == "new" else "filling ['file']\n")
    second.communicate("\n")
    assert second.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"before", "out"}


def test_without_locks_one_of_many_makes_the_folder_after_a_kill(tmp_path, filler):
    first, _ = filler("resumable")
    first.kill()
    first.wait()
    others = [filler("resumable", print_of=f"print {number}") for number in range(4)]
    (won,) = [process for process, said in others if said.startswith("filling")]
    for process, said in others:
        assert process is won or "another job is at work in it" in said
        process.communicate("\n")
        assert process.returncode == (0 if process is won else 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_that_find_a_lease_to_be_over_do_not_both_take_it(tmp_path):
    path = tmp_path / "lease"
    path.write_text(lease._lease("killed", 3))
    found = lease._read(path)
    lease._take(path, tmp_path, found, lease._lease("first", 0))
    with pytest.raises(InUse, match="another job is at work in it"):
        lease._take(path, tmp_path, found, lease._lease("second", 0))
    with pytest.raises(InUse, match="another job is at work in it"):
        lease._take(path, tmp_path, None, lease._lease("third", 0))
    assert lease._read(path)["holder"] == "first"
    assert [one.name for one in tmp_path.iterdir()] == ["lease"]
