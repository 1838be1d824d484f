"""What `import babel_jax` gives: every example of docs/python/examples.md, and what each command imports."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import babel_jax
from babel_jax import api

PAGE = Path(__file__).parents[1] / "docs" / "python" / "examples.md"
EXAMPLES = re.findall(r"```python\n(.+?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)

# Libraries that take long to import or that a plain installation lacks, and commands' modules that must not
# need them.
FOR_PREPARED_DATA = ("tensorflow_datasets", "grain", "array_record", "rensa", "py3langid", "pyarrow")
NEVER_AT_ONCE = ("torch", "transformers", "lm_eval", "ray", "datasets", "matplotlib")
# What a conversion or an expansion of a local Hugging Face folder does without: JAX alone takes as long to
# import as a small model to copy.
FOR_OTHER_FOLDERS = (
    "jax",
    "flax",
    "orbax",
    "tensorstore",
    "fsspec",
    "huggingface_hub",
    "sentencepiece",
    "tokenizers",
    *FOR_PREPARED_DATA,
    *NEVER_AT_ONCE,
)
LACKS = {
    "babel_jax": ("jax", "numpy", "pydantic"),
    "babel_jax.cli": ("jax", "flax", "pydantic", *FOR_PREPARED_DATA, *NEVER_AT_ONCE),
    "babel_jax.inference.generate": (*FOR_PREPARED_DATA, *NEVER_AT_ONCE),
    "babel_jax.inference.chat": (*FOR_PREPARED_DATA, *NEVER_AT_ONCE),
    "babel_jax.expansion.apply": ("tokenizers", *FOR_PREPARED_DATA, *NEVER_AT_ONCE),
    "babel_jax.expansion.folders": FOR_OTHER_FOLDERS,
    "babel_jax.model_folders.transfer": FOR_OTHER_FOLDERS,
    "babel_jax.tpu.plan": (*FOR_PREPARED_DATA, *NEVER_AT_ONCE),
    "babel_jax.training.board": ("torch", "boto3", "botocore"),
    "babel_jax.recipe.recipe": ("boto3", *NEVER_AT_ONCE),
    "babel_jax.quality.judge": ("jax", "flax", "grain", *NEVER_AT_ONCE),
}


def test_every_name_is_there():
    for name in babel_jax._NAMES:
        assert getattr(babel_jax, name) is getattr(api, name)
        assert getattr(api, name).__doc__
    with pytest.raises(AttributeError, match="it has BadInput, Config"):
        babel_jax.nothing  # noqa: B018


@pytest.mark.slow
def test_the_examples_of_the_page_run(base, rows_of, write_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base["hf"], "base")
    for code in ("en", "sw"):
        write_rows(Path("text", f"{code}.jsonl"), rows_of(code, ("web",)))
    names: dict[str, object] = {}
    for example in EXAMPLES:
        exec(compile(example, str(PAGE), "exec"), names)  # the page is ours
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "hf 4 32"
    assert "6 [2, 5]" in shown
    assert "[2]" in shown
    deeper, (baseline,) = names["measured"], names["measured"]["baselines"].values()
    assert deeper["tasks"]["bits_per_byte"] == baseline["tasks"]["bits_per_byte"]
    assert Path("run/hf/model.safetensors").is_file()
    assert "99" in shown[-1]


def test_commands_from_hf_to_hf_import_no_jax(base, tmp_path):
    source, deeper = str(base["hf"]), str(tmp_path / "deeper")
    script = f"""
import sys
from babel_jax.cli import main
assert main(["expand", {source!r}, {deeper!r}, "--append", "1", "--init", "identity"]) == 0
assert main(["convert", {deeper!r}, {deeper + "2"!r}, "--to", "hf"]) == 0
assert main(["expand", {source!r}, {deeper + "3"!r}, "--append", "1", "--init", "noise"]) == 0
print("", *sys.modules, sep="\\n")
"""
    command = [sys.executable, "-c", script]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not {*FOR_OTHER_FOLDERS} & {*shown}
    assert "babel_jax.expansion.folders" in shown


@pytest.mark.parametrize("module", LACKS)
def test_what_a_module_imports(module):
    script = f"import sys, {module}\nprint(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {*LACKS[module]} & {*loaded}
