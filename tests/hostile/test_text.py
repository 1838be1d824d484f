"""Text of strangers: seeded mutations of every kind of file that `babel prepare` reads, through the command
itself.

Each ends with exit status 0, or 2 with one line; none with a traceback, and none takes long or leaves a
half-written folder that a good file could not be prepared in.
"""

import contextlib
import gzip
import io
import json
import random
import time

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from babel_jax.cli import main

MUTATIONS = 48  # of each kind of file
SECONDS = 10.0  # for one
ROWS = [
    {"id": str(number), "kind": "web", "score": 0.5, "text": f"The grandmother opens window number {number}."}
    for number in range(6)
]


def jsonl():
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def warc():
    records = []
    for row in ROWS:
        body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"
        body += f"<html><body><p>{row['text']}</p></body></html>".encode()
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a/{row['id']}\r\n"
        head += f"WARC-Record-ID: <urn:uuid:{row['id']}>\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        head += f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
        records.append(head.encode() + body + b"\r\n\r\n")
    return b"".join(records)


FILES = {
    "en.jsonl": jsonl,
    "en.jsonl.gz": lambda: gzip.compress(jsonl(), mtime=0),
    "en.jsonl.zst": lambda: zstandard.compress(jsonl()),
    "en.txt": lambda: b"\n\n".join(row["text"].encode() for row in ROWS),
    "en.parquet": parquet,
    "en.warc": warc,
    "en.warc.gz": lambda: gzip.compress(warc(), mtime=0),
}
# What replaces a piece of a file: nothing, noise, odd characters, numbers without end, nesting without end.
PIECES = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\n",
    b"\r\n\r\n",
    b'"',
    b"}" * 3,
    b"[" * 5000,
    b'{"a":' * 3000,
    b"1" * 5000,
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"\\ud83d",
    b"\xed\xa0\xbd",
    b"\xef\xbb\xbf",
    b" " * 70_000,
    "\u202e\u0301".encode() * 500,
    b"Content-Length: 99999999999999999",
    b"charset=hex",
    b"a" * 100_000,
)


def mutated(content, draw):
    """The content with one to three pieces cut out, doubled, or replaced, or with flipped bits."""
    for _ in range(draw.randint(1, 3)):
        first, last = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        last = min(last, first + draw.choice((0, 1, 8, 200)))
        match draw.randrange(4):
            case 0:
                content = content[:first]
            case 1:
                content = content[:first] + draw.choice(PIECES) + content[last:]
            case 2:
                content = content[:last] + content[first:]
            case 3 if content:
                place = draw.randrange(len(content))
                content = (
                    content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
                )
    return content


def run(arguments):
    """The exit status, what was printed and what was said."""
    out, err = io.StringIO(), io.StringIO()
    start = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    assert time.monotonic() - start < SECONDS
    return status, out.getvalue(), err.getvalue()


def check_ended(status, out, err):
    """Exit status 0 with JSON, or 2 with one printable line."""
    assert status in (0, 2), err
    assert "Traceback" not in err
    if status == 0:
        json.loads(out)
        return
    said = [line for line in err.split("\n") if line.startswith("babel: ")]
    assert len(said) == 1, err
    assert said[0].isprintable()
    assert len(said[0]) < 2500
    err.encode()


@pytest.fixture
def config(tmp_path, small_model):
    """Writes a config that prepares one file, and gives its arguments."""

    def write(file, folder, **settings):
        cleaned = "\n[data.cleaning]\nmin_characters = 10\n" if settings.get("cleaned") else ""
        path = tmp_path / f"{folder}.toml"
        path.write_text(
            f'out = {json.dumps(str(tmp_path / "run"))}\n[model]\nfolder = "none"\n[data]\nfolder = '
            f"{json.dumps(str(tmp_path / folder))}\n"
            f"tokenizer = {json.dumps(str(small_model))}\nseq_len = 32\nheldout_fraction = 0.0\nbad_rows = "
            f'"{settings.get("bad_rows", "skip")}"\n{cleaned}[[data.sources]]\nlanguage = "en"\npath = '
            f"{json.dumps(str(file))}\n"
        )
        return ["prepare", str(path), "--json"]

    return write


@pytest.mark.parametrize("name", FILES)
def test_mutated_files(name, config, tmp_path):
    whole = FILES[name]()
    path = tmp_path / name
    ended = []
    for number in range(MUTATIONS):
        draw = random.Random(f"{name} {number}")
        path.write_bytes(mutated(whole, draw))
        status, out, err = run(
            config(
                path, f"data{number}", bad_rows=draw.choice(("skip", "refuse")), cleaned=draw.random() < 0.5
            )
        )
        check_ended(status, out, err)
        ended.append(status)
    assert 2 in ended
    # A folder in which a bad file was refused takes a good one.
    refused = ended.index(2)
    path.write_bytes(whole)
    status, out, err = run(config(path, f"data{refused}"))
    assert status in (0, 2), err
    if status == 2:
        assert "prepared with another" in err  # the mutation was prepared with cleaning


TOML = (
    "a = " + "[" * 5000,
    "a = " + "[" * 5000 + "]" * 5000,
    "[" + "a." * 3000 + "a]\nb = 1",
    "seed = " + "9" * 5000,
    "seed = 1" + "0" * 400,
    "seed = nan",
    "seed = -1",
    "[training]\nglobal_batch_size = " + "9" * 300,
    "x = 1e999",
    "x = 0x" + "f" * 5000,
    "\x00",
    b"\xff\xfe",
    "a = '\ud83d'".encode("utf-8", "surrogatepass"),
    "out = '\u202e'\nout2 = 1",
    'out = "' + "a" * 100_000 + '"',
    "a = 1\n" * 2,
    "[data]\nfolder = 5",
    "[[data.sources]]\nlanguage = 'en'\npath = '\\u0000'",
    "",
    "[data]",
    "[data]\nfolder = 'd'\n[[data.sources]]\nlanguage = 'en'\nkind = '" + "k" * 100_000 + "'\npath = 'x'",
    "d = 1979-05-27T07:32:00Z",
    "a" * 100_000,
    "a" * 100_000 + " = 1",
)


@pytest.mark.parametrize("number", range(len(TOML)))
def test_odd_configs(number, tmp_path):
    content = TOML[number]
    path = tmp_path / "config.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    for command in ("prepare", "train", "sft"):
        status, out, err = run([command, str(path), "--json"])
        assert status == 2
        check_ended(status, out, err)


def test_mutated_configs(config, tmp_path):
    path = tmp_path / "en.jsonl"
    path.write_bytes(jsonl())
    arguments = config(path, "data", cleaned=True)
    whole = (tmp_path / "data.toml").read_bytes()
    for number in range(MUTATIONS):
        draw = random.Random(f"config {number}")
        content = mutated(whole, draw)
        if b"path" not in content or b"folder" not in content:
            continue
        (tmp_path / "data.toml").write_bytes(content)
        check_ended(*run(arguments))
