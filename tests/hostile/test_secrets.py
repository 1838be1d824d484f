"""Planted secrets of the environment stand in no file and no output of the commands."""

import base64
import json
import urllib.parse

import pytest

from babel_jax.cli import main
from babel_jax.errors import BadInput, shown

SECRETS = {
    "OPENAI_API_KEY": "sk-planted-0123456789abcdef",
    "HF_TOKEN": "hf_planted0123456789abcdef",
    "HUGGING_FACE_HUB_TOKEN": "hf_second0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/0123456789abcdef",
    "GOOGLE_API_KEY": "AIza-planted-0123456789abcdef",
}


def forms(secret):
    return secret.encode(), base64.b64encode(secret.encode()), secret[:16].encode()


@pytest.fixture(scope="module")
def written(recipe_config, small_settings, small_model, base, tmp_path_factory):
    """All that a chain of commands wrote to the terminal and into files."""
    folder = tmp_path_factory.mktemp("secrets")
    config = recipe_config(folder / "run", small_settings, small_model, {"folder": base["hf"]})
    config.save(folder / "run.toml")
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        for command in (
            ["train", "run.toml", "--set", f"data.folder={folder / 'data'}"],
            ["report", "run"],
            ["verify", "run"],
            ["mixture", "run.toml", "--set", f"data.folder={folder / 'data'}", "--out", "mixture"],
            ["convert", "run/hf", "orbax"],
            ["expand", "run/hf", "deeper", "--append", "1"],
            ["evaluate", "run/hf", "--languages", "sw", "--out", "table"],
            ["sensitivity", "run/hf", "--languages", "sw", "--max-bytes", "200", "--out", "sensitivity"],
        ):
            patch.chdir(folder)
            assert main(command) == 0, command
    return folder


def test_no_secret_in_any_file(written, capfd):
    files = [path for path in written.rglob("*") if path.is_file()]
    assert len(files) > 60
    for path in files:
        data = path.read_bytes()
        for name, secret in SECRETS.items():
            assert not any(form in data for form in forms(secret)), (path, name)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "missing.toml"],
        ["train", "run.toml", "--set", "seed=x"],
        ["convert", "missing", "out"],
        ["evaluate", "run/hf", "--tasks", "nothing"],
        ["generate", "run/hf", ""],
        ["verify", "missing"],
        ["report", "missing"],
    ],
)
def test_no_secret_in_any_message(written, capfd, monkeypatch, command):
    monkeypatch.chdir(written)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    assert main(command) == 2
    said = capfd.readouterr()
    for secret in SECRETS.values():
        assert not any(form.decode() in said.out + said.err for form in forms(secret))


@pytest.mark.parametrize(
    ("variable", "value", "is_hidden"),
    [
        ("HF_TOKEN", "hf_planted+secret/1", True),
        ("AWS_SECRET_ACCESS_KEY", "abc/def+ghi", True),
        ("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token-planted", True),
        ("my_password", "pass word", True),
        ("SSH_KEY", "/home/someone/key", False),
        ("TOKENIZERS_PARALLELISM", "planted-value", False),
        ("MONKEY", "planted-value", False),
        ("API_KEY", "short", False),
    ],
)
def test_a_secret_that_a_server_repeats_is_not_shown(monkeypatch, variable, value, is_hidden):
    monkeypatch.setenv(variable, value)
    for form in (value, urllib.parse.quote(value, safe=""), json.dumps(value)[1:-1]):
        problem = str(BadInput(f"gs://bucket/run: cannot be read (bad token {form})"))
        assert (form not in problem) == is_hidden
        assert shown(f"log: {form}.") == ("log: [key]." if is_hidden else f"log: {form}.")
