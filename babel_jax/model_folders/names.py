"""The rule between a tensor's Hugging Face name and its place in the parameter tree; there is no table.

`model.layers.7.mlp.up_proj.weight` is row 7 of the leaf at ("model", "layers", "mlp", "up_proj", "weight").
Any other name is its path.
"""

import re

from babel_jax.model.shapes import LAYERS, Place, is_stacked

_LAYER_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")


def tensor_name(place: Place, layer: int | None) -> str:
    """The Hugging Face name of one layer's row of the leaf at `place`; `layer` is None for a leaf outside the
    layers.
    """
    return ".".join(place if layer is None else (*LAYERS, str(layer), *place[len(LAYERS) :]))


def tensor_place(name: str) -> tuple[Place, int | None]:
    """The inverse of `tensor_name`."""
    match = _LAYER_NAME.fullmatch(name)
    return ((*LAYERS, *match[2].split(".")), int(match[1])) if match else (tuple(name.split(".")), None)


def tensor_names(place: Place, layers: int) -> list[str]:
    """The names of all tensors in the leaf at `place`: one for each layer, or one outside the layers."""
    if not is_stacked(place):
        return [tensor_name(place, None)]
    return [tensor_name(place, layer) for layer in range(layers)]
