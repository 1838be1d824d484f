"""Checks with transformers, if it is installed, that it can make the model of a written config.json: a reader
that we did not write.

It runs in a separate process, which takes no memory from this one, and never runs code of the folder.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from babel_jax.errors import one_line
from babel_jax.model.shapes import Shape
from babel_jax.new_folders import Unverified

_SECONDS = 600  # a large model's modules are made on torch's meta device, without memory for values
_PROGRAM = """
import json, sys
import transformers
config = transformers.AutoConfig.from_pretrained(sys.argv[1], local_files_only=True, trust_remote_code=False)
found = {"version": transformers.__version__, "shapes": None}
if transformers.utils.is_torch_available():
    import torch
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    found["shapes"] = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
print(json.dumps(found))
"""


def loaded_by_transformers(written: Path, source: Path, expected: Mapping[str, Shape]) -> str:
    """The version of transformers that loads the config.json in `written`, or the reason why it was not
    asked.

    If torch is installed too, the parameters of its model must be `expected` (shapes by name). Raises
    Unverified if transformers fails on `written` but not on `source`, and if its parameters differ.
    """
    if importlib.util.find_spec("transformers") is None:
        return "not asked: transformers is not installed"
    answer, failure = _ask(written)
    if failure:
        # If transformers does not load the source either (a newer version), the fault is not ours.
        if _ask(source)[1]:
            return f"does not load the source either: {failure}"
        raise Unverified(
            f"{written}: transformers does not load its config.json ({failure}); tell the developers"
        )
    # Without torch, transformers reads the config and makes no model.
    if answer["shapes"] is not None:
        theirs = {name: tuple(shape) for name, shape in answer["shapes"].items()}
        wrong = sorted(
            name for name in theirs.keys() | expected.keys() if theirs.get(name) != expected.get(name)
        )
        if wrong:
            shapes = f"{wrong[0]} has shape {theirs.get(wrong[0])} there and {expected.get(wrong[0])} here"
            raise Unverified(
                f"{written}: transformers makes another model of its config.json ({shapes}); tell the "
                "developers"
            )
    return f"loads with transformers {answer['version']}"


def _ask(folder: Path) -> tuple[dict[str, Any], str]:
    """The answer of transformers for one folder, and a line with the reason if there is none."""
    # Offline: the folder must be enough, and nothing may be fetched.
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", _PROGRAM, str(folder)]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env={**os.environ, **quiet},
            start_new_session=True,  # Ctrl-C must reach only the parent process
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer within {_SECONDS} s"
    if answer.returncode:
        return {}, one_line(
            (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1], 300
        )
    return json.loads(answer.stdout.splitlines()[-1]), ""
