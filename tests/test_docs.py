"""The site is built without a warning; each setting and each command is on it."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from babel_jax.commands.parser import GROUPS, BabelParser
from babel_jax.config import Config, MixtureSettings, TrainingSettings
from babel_jax.config.quality import QualityConfig

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
        anchor = name.replace(" ", "-")
        assert f'id="{anchor}"' in page


def test_every_public_name_is_on_the_page(site):
    page = (site / "python" / "reference" / "index.html").read_text(encoding="utf-8")
    assert 'id="babel_jax.api.evaluate"' in page


def test_links_lead_to_files_where_the_site_is_not_built():
    """As a forge shows the pages: there, pages that `docs/build.py` makes are short ones that say so."""
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]
    dead = []
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                dead.append(f"{page.name}: {link}")
    assert not dead


def test_every_command_is_in_one_group():
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(BabelParser().commands)


def test_every_setting_has_a_meaning_and_every_number_a_unit(monkeypatch):
    """A fraction from 0 to 1 and a seed need no unit."""
    pytest.importorskip("griffe", reason="pip install '.[docs]'")
    monkeypatch.syspath_prepend(str(DOCS))
    settings_page = importlib.import_module("settings_page")
    waiting, seen = [Config, QualityConfig], set()
    while waiting:
        kind = waiting.pop()
        if kind in seen:
            continue
        seen.add(kind)
        told = settings_page.meanings(kind)
        schema = kind.model_json_schema()["properties"]
        for name, field in kind.model_fields.items():
            meaning, unit = told[name]
            assert meaning, f"{kind.__name__}.{name} has no string below it that says what it means"
            assert meaning[0].isupper() or meaning.startswith("`"), f"{kind.__name__}.{name}: {meaning}"
            parts = [schema[name], *schema[name].get("anyOf", [])]
            numbers = [part for part in parts if part.get("type") in ("integer", "number")]
            for number in numbers:
                is_fraction = number.get("maximum") == 1.0
                assert unit or is_fraction or name == "seed", f"{kind.__name__}.{name} has no unit"
            waiting += settings_page.classes_in(field.annotation, BaseModel)
    assert len(seen) > 15


def test_a_fault_of_the_pages_ends_the_build(tmp_path):
    """A page that is not in the navigation, and a picture that is not there."""
    docs = tmp_path / "docs"
    shutil.copytree(DOCS, docs)
    (docs / "how-to" / "new.md").write_text("# New\n\n![a picture](none.png)\n")
    pytest.importorskip("zensical", reason="pip install '.[docs]'")
    built = subprocess.run(
        [sys.executable, docs / "build.py", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(DOCS.parent)},
    )
    assert built.returncode == 1
    assert "how-to/new.md: this page is not in the navigation" in built.stderr
    assert "how-to/new.md: there is no picture none.png" in built.stderr
