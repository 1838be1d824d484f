"""The benchmarks can be run: measured figures belong into notes, but a benchmark that fell behind the code
helps nobody.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from babel_jax.errors import BadInput

FOLDER = Path(__file__).parents[1] / "benchmarks"
NEEDS_TORCH = {"train_step.py", "evaluation.py"}


def run(name: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, FOLDER / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def path_of_scripts() -> list[str]:
    """sys.path of a script of this environment, without the script's own folder."""
    script = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    return json.loads(subprocess.run(script, capture_output=True, cwd=FOLDER, check=True).stdout)


@pytest.mark.parametrize(
    "name",
    sorted(file.name for file in FOLDER.glob("*.py") if "__main__" in file.read_text(encoding="utf-8")),
)
def test_a_benchmark_finds_what_it_imports(name, path_of_scripts, monkeypatch, capsys):
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    # In this process, which has imported most of it already, by the path that the script would have.
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(sys, "path", [str(FOLDER), *path_of_scripts])
    for module in [module for module in sys.modules if module.partition(".")[0] == "tests"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_the_loader_reads_what_the_benchmark_writes():
    shown = run("loader.py", "--windows", "16", "--seq-len", "1024", "--batch", "8", "--rounds", "1")
    assert all(contestant in shown for contestant in ("Batches[step]", "Grain's own mix", "one TFDS dataset"))


def test_a_plan_is_compiled_again_only_with_other_options_of_the_compiler(tmp_path, monkeypatch, capsys):
    results = tmp_path / "plans.json"
    script = runpy.run_path(str(FOLDER / "pod_plans.py"))
    compiled = []

    def plan(config, topology, *_):
        compiled.append(topology)
        raise BadInput("not compiled here")

    # The functions of the script look their names up in this dictionary.
    names = script["main"].__globals__
    monkeypatch.setitem(names, "plan", plan)
    monkeypatch.setattr(sys, "argv", ["pod_plans.py", "--results", str(results), "--only", "babel-9b v6e"])
    # Written before the options were kept.
    (row,) = [row for row in script["PLANS"] if row[:2] == ("babel-9b", "v6e:8x8")]
    name = script["name_of"](*row)
    results.write_text(json.dumps({name: {"fits": False, "error": "older"}}))
    for _ in range(2):
        script["main"]()
    assert compiled == ["v6e:8x8"]
    assert json.loads(results.read_text())[name]["error"] == "not compiled here"
    monkeypatch.setitem(names, "tpu_options", lambda chip: {"an_option": chip})
    script["main"]()
    assert compiled == ["v6e:8x8"] * 2
    assert json.loads(results.read_text())[name]["compiler_options"] == {"an_option": "v6e"}
