"""`babel init`: the config that it writes runs as it is; bad input is one line."""

import io
import json
import sys
import tomllib

import pytest

from babel_jax.cli import main
from babel_jax.config.file import load_config


@pytest.fixture
def text(small_settings, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for source in small_settings.sources:
        (folder / f"{source.language}.jsonl").symlink_to(source.path)
    return folder


@pytest.fixture
def babel(capsys):
    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def test_every_device_gives_a_config_that_is_read(babel, base, text, tmp_path):
    for device in ("cpu", "gpu", "tpu"):
        out = tmp_path / f"{device}.toml"
        status, said, _ = babel(
            "init", "--model", base["hf"], "--data", text, "--languages", "sw,en", "--out", out, "--device",
            device, "--json",
        )  # fmt: skip
        assert status == 0
        told = json.loads(said)
        assert (told["languages"], told["layers"], told["new_layers"]) == (["en", "sw"], 4, 1)
        config = load_config(out)
        assert [source.language for source in config.data.sources] == ["en", "sw"]
        assert sum(stage.tokens for stage in config.stages) == told["tokens"]
        assert config.training.global_batch_size % config.training.gradient_accumulation == 0
        assert config.data.seq_len <= 128  # the positions of the model


@pytest.mark.slow
def test_it_runs_as_it_is(babel, base, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ("--model", base["hf"], "--data", text, "--new-layers", 2, "--tokens", 6000)
    assert babel("init", *model)[0] == 0
    assert babel("prepare", "my-run.toml")[0] == 0
    status, said, _ = babel("mixture", "my-run.toml")
    assert status == 0
    assert "recovery" in said
    status, said, error = babel("train", "my-run.toml", "--json")
    assert status == 0, error
    told = json.loads(said)
    assert told["layers"] == 6
    assert set(told["bits_per_byte"]) == {"base", "expanded", "recovered", "continued"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--languages": "sw,th"}, "no text in th: a file th.jsonl"),
        ({"--languages": "xx"}, "'xx'"),
        ({"--new-layers": "9"}, "new_layers = 9: the model has 4 layers to copy"),
        ({"--model": "nowhere"}, "nowhere"),
        ({"--data": "nowhere"}, "nowhere: no such folder of text"),
        ({"--out": "there.toml"}, "there.toml: it is there already"),
        ({"--model": None}, "give --model (it asks for them on a terminal)"),
        ({"--model": None, "--data": None}, "give --model and --data"),
        ({"--out": "/proc/new.toml"}, "/proc/new.toml: no file can be made in /proc"),
        ({"--out": "gs://bucket/run.toml"}, "must be a folder on disk"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(babel, base, text, tmp_path, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.toml").write_text("mine")
    given = {"--model": base["hf"], "--data": str(text), "--out": "new.toml"} | change
    status, said, error = babel("init", *[word for pair in given.items() if pair[1] for word in pair])
    assert (status, said) == (2, "")
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new.toml").exists()
    assert (tmp_path / "there.toml").read_text() == "mine"


def test_on_a_terminal_it_asks_for_what_is_missing(babel, base, text, tmp_path, monkeypatch):
    answers = iter(["", base["hf"], str(text), "sw,en", "2"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert babel("init", "--out", tmp_path / "asked.toml")[0] == 0
    written = tomllib.loads((tmp_path / "asked.toml").read_text())
    assert written["expansion"]["new_layers"] == 2
    assert [source["language"] for source in written["data"]["sources"]] == ["en", "sw"]


def test_a_path_with_odd_letters_is_written_so_that_it_is_read_back(babel, base, text, tmp_path):
    odd = text.rename(tmp_path / 'te"xt \\ é\n')
    out = tmp_path / "run.toml"
    assert babel("init", "--model", base["hf"], "--data", odd, "--out", out)[0] == 0
    assert load_config(out).data.sources[0].path == str(odd / "en.jsonl")


ODD_NAMES = [
    '"\\',
    "\x1b[31m",
    "a\n[model]\nfolder = 'other'\n",
    "\x7f\x85\u2028\u202e",
    "\U0001f600 é",
    "{x}%",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_names_with_odd_letters_are_read_back(babel, base, text, tmp_path, name):
    """Letters beyond 16 bits, control characters, and line ends that would begin settings of their own."""
    model = tmp_path / f"m{name}"
    model.symlink_to(base["hf"])
    out = tmp_path / f"r{name}"
    status, _, error = babel("init", "--model", model, "--data", text, "--out", out)
    assert status == 0, error
    config = load_config(out)
    assert config.model.folder == str(model)
    assert config.out.endswith(f"/runs/{out.stem}/run")


@pytest.mark.parametrize("option", ["--model", "--data", "--out"])
def test_a_path_that_is_not_utf8(babel, base, text, tmp_path, option):
    paths = {"--model": tmp_path / "m", "--data": tmp_path / "d", "--out": tmp_path / "new.toml"}
    paths[option] = tmp_path / "\udcff"
    paths["--model"].symlink_to(base["hf"])
    paths["--data"].symlink_to(text)
    status, _, error = babel("init", *[word for pair in paths.items() for word in pair])
    assert status == 2
    assert "\\udcff" in error
    assert "a path that is not UTF-8" in error
    assert error.count("\n") == 1
    assert not paths["--out"].exists()


@pytest.mark.parametrize("answer", [b"", b"\xff\n"], ids=["end", "bytes"])
@pytest.mark.parametrize("asked", ["--model", "--new-layers"])
def test_answers_that_end_or_are_no_text(babel, base, text, tmp_path, monkeypatch, asked, answer):
    before = b"" if asked == "--model" else f"{base['hf']}\n{text}\n\n".encode()
    stream = io.BytesIO(before + answer)
    monkeypatch.setattr("builtins.input", lambda _: _line_of(stream))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    status, _, error = babel("init", "--out", tmp_path / "new.toml")
    assert status == 2
    assert error.splitlines()[-1].endswith(f"give {asked}")
    assert not (tmp_path / "new.toml").exists()


def _line_of(stream):
    line = stream.readline()
    if not line:
        raise EOFError
    return line.decode().rstrip("\n")
