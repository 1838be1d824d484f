"""Reads the JSON objects that `babel prepare` wrote; a damaged file raises one line that names it."""

from pathlib import Path
from typing import Any

from babel_jax import files
from babel_jax.errors import BadInput


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises BadInput if it cannot be read."""
    try:
        values = files.read_json(path)
        if isinstance(values, dict):
            return values
        problem = "not an object"
    except (OSError, ValueError) as error:
        problem = str(error)
    raise BadInput(
        f"{path}: not readable JSON ({problem}); remove the folder {path.parent} and run `babel prepare` "
        "again"
    )
