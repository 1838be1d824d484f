"""The site is built without a warning; each setting and each command is on it."""

import subprocess
import sys
from pathlib import Path

import pytest

from babel_jax.commands.parser import GROUPS, BabelParser
from babel_jax.config import Config, MixtureSettings, TrainingSettings

DOCS = Path(__file__).parents[1] / "docs"


def build(out, script=DOCS / "build.py"):
    return subprocess.run(
        [sys.executable, script, "--out", out], capture_output=True, text=True, check=False, timeout=600
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("zensical", reason="pip install '.[docs]'")
    out = tmp_path_factory.mktemp("docs")
    built = build(out)
    assert built.returncode == 0, built.stdout + built.stderr
    return out / "site"


def test_every_page_of_the_navigation_is_built(site):
    for page in ("index.html", "how-to/buckets/index.html", "plans/index.html", "log/index.html"):
        assert (site / page).is_file()


def test_every_setting_is_on_the_page(site):
    page = (site / "reference" / "settings" / "index.html").read_text(encoding="utf-8")
    for kind in (Config, MixtureSettings, TrainingSettings):
        for name in kind.model_fields:
            assert f"<code>{name}</code>" in page


def test_every_command_is_on_the_page(site):
    page = (site / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    for name in BabelParser().commands:
        assert f'id="{name}"' in page


def test_every_public_name_is_on_the_page(site):
    page = (site / "python" / "reference" / "index.html").read_text(encoding="utf-8")
    assert 'id="babel_jax.api.evaluate"' in page


def test_every_command_is_in_one_group():
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(BabelParser().commands)
