"""The parameter tree in an Orbax checkpoint: the same nested tree, layers stacked, every leaf in its own type."""

import contextlib
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

PARAMS = "params"


def load_orbax_params(folder: Path, config: ModelConfig, dtype: Any, shardings: dict[Place, jax.sharding.Sharding]) -> PyTree[Array]:
    """The parameter tree of an Orbax folder. `dtype` None keeps each leaf's own type.

    Raises BadInput when params/ is damaged or does not hold the model of the config.
    """
    path = folder / PARAMS
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
    with _quiet():
        ocp.save(folder / PARAMS, params)


@contextlib.contextmanager
def _explain(path: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except Exception as error:  # Orbax and tensorstore raise whatever they meet: JSON, key, value and OS errors
        line = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: missing or damaged Orbax parameters ({type(error).__name__}: {line}); make the folder again") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs tracebacks of errors that it also raises; one line is enough for them."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
