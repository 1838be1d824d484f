"""Every dependency, the indirect ones too, is pinned in constraints.txt, at the version that is installed
here.
"""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINES = [
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS_HERE = ("test", "eval", "hf", "ray", "warc", "reference")


def test_every_line_is_an_exact_version_and_names_no_host():
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[^ ;]+( ; .+)?", line), line
        assert "://" not in line
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_all_that_is_needed_is_pinned_at_the_version_that_is_installed():
    pinned = {}
    for requirement in map(Requirement, LINES):
        if requirement.marker is None or requirement.marker.evaluate():
            pinned[canonicalize_name(requirement.name)] = requirement
    optional = PROJECT["optional-dependencies"]
    texts = list(PROJECT["dependencies"])
    for extra in EXTRAS_HERE:
        texts += optional[extra]
    waiting = [Requirement(text) for text in texts]
    seen = set()
    while waiting:
        needed = waiting.pop()
        name = canonicalize_name(needed.name)
        if name == "babel-jax" or (name, *needed.extras) in seen:
            continue
        seen.add((name, *needed.extras))
        assert name in pinned, f"{name} is not in constraints.txt; run `make constraints`"
        version = importlib.metadata.version(name).partition("+")[0]
        assert pinned[name].specifier.contains(version, prereleases=True), (
            f"{name} {version} is installed, and {pinned[name]} is pinned"
        )
        for text in importlib.metadata.requires(name) or ():
            below = Requirement(text)
            if below.marker is None or any(
                below.marker.evaluate({"extra": extra}) for extra in (*needed.extras, "")
            ):
                waiting.append(below)
    assert len(seen) > 100


def test_every_pin_is_of_something_that_is_needed_directly_or_by_another():
    """All extras are there: a pin for a TPU or a GPU too."""
    names = {canonicalize_name(Requirement(line).name) for line in LINES}
    direct = [text for texts in PROJECT["optional-dependencies"].values() for text in texts] + PROJECT[
        "dependencies"
    ]
    assert {canonicalize_name(Requirement(text).name) for text in direct} - {"babel-jax"} <= names
