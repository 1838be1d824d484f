"""The parameter tree in an Orbax checkpoint: the same nested tree, layers stacked, every leaf in its own type."""

import contextlib
import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from flax import traverse_util
from jaxtyping import Array, PyTree
from orbax.checkpoint import v1 as ocp

from babel_jax.checkpoints.layout import check_shapes, leaf_shapes
from babel_jax.checkpoints.names import Place
from babel_jax.config import ModelConfig
from babel_jax.errors import BadInput
from babel_jax.files import write_text

PARAMS = "params"
# Names and sizes of the files that Orbax wrote: it does not miss a truncated file before it reads that part, and then prints tracebacks.
FILES = "files.json"


def load_orbax_params(folder: Path, config: ModelConfig, dtype: Any, shardings: dict[Place, jax.sharding.Sharding]) -> PyTree[Array]:
    """The parameter tree of an Orbax folder. `dtype` None keeps each leaf's own type.

    Raises BadInput when params/ is damaged or does not hold the model of the config.
    """
    path = folder / PARAMS
    _check_files(path)
    with _explain(path):
        stored = traverse_util.flatten_dict(ocp.metadata(path).metadata)
    shapes = leaf_shapes(config)
    check_shapes(
        {"/".join(place): tuple(leaf.shape) for place, leaf in stored.items()},
        {"/".join(place): shape for place, shape in shapes.items()},
        path,
        lambda _: path,
    )
    wanted = {
        place: jax.ShapeDtypeStruct(shape, dtype or stored[place].dtype, sharding=shardings[place]) for place, shape in shapes.items()
    }
    with _explain(path):
        return ocp.load(path, traverse_util.unflatten_dict(wanted))


def save_orbax_params(folder: Path, params: PyTree[Array]) -> None:
    """Writes params/ into `folder`."""
    path = folder / PARAMS
    with _quiet():
        ocp.save(path, params)
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}
    write_text(path / FILES, json.dumps(sizes, indent=2) + "\n")


def _check_files(path: Path) -> None:
    """Raises BadInput when a file is missing or has another size than it was written with. Orbax checkpoints of others have no list."""
    if not (path / FILES).is_file():
        return
    with _explain(path):
        sizes: dict[str, int] = dict(json.loads((path / FILES).read_text(encoding="utf-8")))
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes long, not {size}"
            raise BadInput(f"{path / name}: {state}: damaged Orbax parameters; make the folder again")


@contextlib.contextmanager
def _explain(path: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except Exception as error:  # Orbax and tensorstore raise whatever they meet: JSON, key, value and OS errors
        line = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: damaged Orbax parameters ({type(error).__name__}: {line}); make the folder again") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax and asyncio log tracebacks of errors that are also raised; one line is enough for them."""
    verbosity, asyncio_logger = absl_logging.get_verbosity(), logging.getLogger("asyncio")
    absl_logging.set_verbosity(absl_logging.FATAL)
    asyncio_logger.disabled = True
    try:
        yield
    except BaseException:
        gc.collect()  # asyncio reports failed tasks when they are collected, which must be before the log comes back
        raise
    finally:
        asyncio_logger.disabled = False
        absl_logging.set_verbosity(verbosity)
