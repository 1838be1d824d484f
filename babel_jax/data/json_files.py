"""JSON objects that babel prepare wrote, read back: a damaged one is named in one line."""

from pathlib import Path
from typing import Any

from babel_jax import files
from babel_jax.errors import BadInput


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BadInput when it cannot be read."""
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
