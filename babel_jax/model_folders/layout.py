"""The tensors that a model folder must have by its config, and the comparison with those that it has."""

from collections.abc import Callable, Mapping
from pathlib import Path

from babel_jax.config import ModelConfig
from babel_jax.errors import BadInput
from babel_jax.model.shapes import Shape, is_stacked, leaf_shapes
from babel_jax.model_folders.names import tensor_name

_SHOWN = 3


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shape of every tensor of an HF folder, by its name: first those outside the layers, then layer
    after layer.
    """
    leaves = leaf_shapes(config)
    outside = {tensor_name(place, None): shape for place, shape in leaves.items() if not is_stacked(place)}
    stacked = {place: shape for place, shape in leaves.items() if is_stacked(place)}
    shapes = dict(outside)
    # Layer after layer, as files are written: a shard then has neighbouring layers.
    for layer in range(config.num_hidden_layers):
        for place, shape in stacked.items():
            shapes[tensor_name(place, layer)] = shape[1:]
    return shapes


def check_shapes(
    stored: Mapping[str, Shape], expected: Mapping[str, Shape], folder: Path, place_of: Callable[[str], Path]
) -> None:
    """Raises BadInput unless `stored` has exactly the expected tensors, each with its shape.

    `place_of` returns the file of a tensor.
    """
    missing = [name for name in expected if name not in stored]
    if missing:
        raise BadInput(
            f"{folder}: missing {_several(missing)}, which config.json calls for; fetch the folder again or "
            "correct config.json"
        )
    unexpected = [name for name in stored if name not in expected]
    if unexpected:
        raise BadInput(
            f"{place_of(unexpected[0])}: unexpected {_several(unexpected)}, which the model in config.json "
            "does not have"
        )
    for name, shape in expected.items():
        if stored[name] != shape:
            raise BadInput(
                f"{place_of(name)}: tensor {name} has shape {list(stored[name])}; config.json calls for "
                f"{list(shape)}"
            )


def _several(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"tensor {shown}" if len(names) == 1 else f"{len(names)} tensors ({shown})"
