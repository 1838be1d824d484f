"""`babel init`: the config that it writes runs as it is; bad input is one line."""

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
    answers = iter(["", base["hf"], str(text), "2"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert babel("init", "--out", tmp_path / "asked.toml")[0] == 0
    assert tomllib.loads((tmp_path / "asked.toml").read_text())["expansion"]["new_layers"] == 2


def test_a_path_with_odd_letters_is_written_so_that_it_is_read_back(babel, base, text, tmp_path):
    odd = text.rename(tmp_path / 'te"xt \\ é\n')
    out = tmp_path / "run.toml"
    assert babel("init", "--model", base["hf"], "--data", odd, "--out", out)[0] == 0
    assert load_config(out).data.sources[0].path == str(odd / "en.jsonl")
