"""The benchmarks can be run: measured figures belong into notes, but a benchmark that fell behind the code
helps nobody.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
NEEDS_TORCH = {"train_step.py", "evaluation.py"}


def run(name: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, FOLDER / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    "name",
    sorted(file.name for file in FOLDER.glob("*.py") if "__main__" in file.read_text(encoding="utf-8")),
)
def test_a_benchmark_finds_what_it_imports(name):
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    assert "usage" in run(name, "--help")


def test_the_loader_reads_what_the_benchmark_writes():
    shown = run("loader.py", "--windows", "16", "--seq-len", "1024", "--batch", "8", "--rounds", "1")
    assert all(contestant in shown for contestant in ("Batches[step]", "Grain's own mix", "one TFDS dataset"))
