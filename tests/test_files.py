"""Reading of files that may come from strangers, and messages about them."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest

from babel_jax.disk_errors import os_error_line
from babel_jax.errors import BadInput, json_printable, one_line, printable
from babel_jax.files import read_bytes, read_json, read_text, regular_file, write_text
from babel_jax.json_text import MOST_DEPTH, parse_json


def test_control_characters_are_escaped_and_letters_of_all_scripts_stay():
    assert printable("a\x1b[31m\x9b\u202e\ud800\tb\nc") == "a\\x1b[31m\\x9b\\u202e\\ud800\tb\nc"
    persian, hindi = "می\u200cروم", "क्\u200dष"
    assert printable(persian + hindi) == persian + hindi
    assert one_line("a \r\n\n  b\u2028c\td\x07") == "a b c d\\x07"
    long = one_line("x" * 10_000 + "end", 100)
    assert len(long) < 110
    assert long.endswith("end")


def test_a_message_is_one_printable_line_however_it_was_made():
    error = BadInput("a\nb\x1b")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "a b\\x1b"


def test_json_stays_json_with_the_same_values():
    values = {"key\x9b": "a\x7f\u202e\U000e0001\ud800 é\n"}
    text = json_printable(json.dumps(values, ensure_ascii=False))
    assert json.loads(text) == values
    assert text.isprintable()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a readable JSON file"),
        ("[" * 100_000, "nested"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "nested"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e400", "beyond float64"),
        ("1" * 101, "101 digits"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there more than once"),
        ('"\\ud800"', "surrogates not allowed"),
        (b'"\xff"', "can't decode"),
    ],
)
def test_json_that_others_would_read_otherwise_or_not_at_all_is_refused(text, says):
    with pytest.raises(BadInput, match=says) as raised:
        parse_json(text, "file:3")
    assert str(raised.value).startswith("file:3: not a readable JSON file: ")


def test_json_that_is_right_is_read():
    assert parse_json(
        b'\xef\xbb\xbf{"a": [1, 2.5, "\\ud83d\\ude00", null, 1000000000000000019884624838656]}', "file"
    ) == {"a": [1, 2.5, "😀", None, 10**30 + 19884624838656]}
    assert parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH, "file")
    assert parse_json('{"a": 1, "a": 2}', "file", unique_keys=False) == {"a": 2}


def test_only_regular_files_inside_of_the_folder_are_read(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "secret"
    (folder / "below").mkdir(parents=True)
    outside.write_text("secret")
    (folder / "plain").write_text("plain")
    (folder / "inside").symlink_to("below/../plain")
    (folder / "out").symlink_to("../secret")
    (folder / "dangling").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
    (folder / "environ").symlink_to("/proc/self/environ")
    (folder / "way").symlink_to(tmp_path)
    os.mkfifo(folder / "fifo")
    assert read_text(folder / "inside", folder) == "plain"
    assert read_text(folder / "out") == "secret"  # a file that the user names may be a link
    for name, says in {
        "out": "outside of the folder",
        "environ": "outside of the folder",
        "way/secret": "outside of the folder",
        "dangling": "a link to nothing, which is not there",
        "loop": "no such file",
        "fifo": "no regular file",
        "below": "a folder; a file is needed",
        "x" * 100_000: "no such file",
        "nul\0": "no such file",
    }.items():
        with pytest.raises(BadInput, match=says) as raised:
            read_bytes(folder / name, folder)
        assert len(str(raised.value)) < 1000
    with pytest.raises(BadInput, match="no regular file"):
        read_bytes(tmp_path / "/dev/zero")
    with pytest.raises(FileNotFoundError):
        read_json(folder / "absent", folder)


def test_the_cache_of_the_hub_links_to_its_blobs_alone(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    (snapshot / "templates").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "4567").write_text("{}")
    (blobs / "secret").symlink_to("/proc/self/environ")
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    (snapshot / "templates" / "one").symlink_to("../../../blobs/4567")
    (snapshot / "bad").symlink_to("../../blobs/secret")
    assert read_json(snapshot / "config.json", snapshot) == {}
    assert read_json(snapshot / "templates" / "one", snapshot) == {}
    with pytest.raises(BadInput, match="outside"):
        regular_file(snapshot / "bad", snapshot)


def test_sizes_are_bounded_before_anything_is_read(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(4 * 2**40)
    with pytest.raises(BadInput, match=r"sparse: larger than the 1,000 bytes"):
        read_bytes(tmp_path / "sparse", most_bytes=1000)
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_text(tmp_path / "text")


def test_names_that_no_file_can_have_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for name, says in (("x" * 5000, "too long"), ("file/below", "Not a directory|there is no folder")):
        with pytest.raises(BadInput, match=says) as raised:
            write_text(tmp_path / name, "text")
        assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EINVAL, "Invalid argument", "a/b"), "a/b: the file system refused (Invalid argument)"),
        (
            ValueError("Failed to rename fd: 19: Invalid argument [os_error_code='22']"),
            "here: the file system refused (Invalid argument)",
        ),
        (
            ValueError("I/O error: No such device or address (os error 6)"),
            "here: the file system refused (No such device or address)",
        ),
        (
            OSError("[Errno 22] Error writing bytes to file"),
            "here: the file system refused (Invalid argument)",
        ),
        (ValueError("Error writing: Permission denied [os_error_code='13']"), "here: not permitted"),
        (
            OSError(errno.EMFILE, "Too many open files", "a"),
            "a: Too many open files; raise the limit (ulimit -n)",
        ),
    ],
)
def test_an_error_of_the_file_system_is_one_line(error, says):
    assert os_error_line(error, Path("here")).startswith(says)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file", "a"), ValueError("9 is no error"), OSError("timed out")],
)
def test_an_error_of_the_program_keeps_its_traceback(error):
    assert os_error_line(error, Path("here")) is None
