"""`babel completion`: the shells read the scripts, and bash completes by them."""

import shutil
import subprocess

import pytest

from babel_jax.cli import main

pytest.importorskip("shtab")


@pytest.fixture
def script(capsys):
    def of(shell):
        assert main(["completion", shell]) == 0
        return capsys.readouterr().out

    return of


def completed(script, *words):
    """What bash offers for the last of these words."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
        "_shtab_babel 2>/dev/null; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    found = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.split()


def test_bash_completes_commands_options_and_choices(script):
    bash = script("bash")
    assert completed(bash, "babel", "ex") == ["expand"]
    assert "--new-layers" in completed(bash, "babel", "expand", "--n")
    assert set(completed(bash, "babel", "expand", "--init", "")) >= {"copy", "identity"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_every_command(script, shell):
    text = script(shell)
    assert "sensitivity" in text
    assert "--insert-after" in text or "insert-after" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_another_shell_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["completion", "csh"])
    assert ended.value.code == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err
