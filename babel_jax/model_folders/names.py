"""The rule between a tensor's Hugging Face name and its place in the parameter tree; there is no table.

`model.layers.7.mlp.up_proj.weight` is row 7 of the leaf at ("model", "layers", "mlp", "up_proj", "weight");
any other name is its path.
"""

import re

from babel_jax.model.parameters import LAYERS, Place, is_stacked

_LAYER_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")


def tensor_name(place: Place, layer: int | None) -> str:
    """The Hugging Face name of one layer's row of the leaf at `place`; `layer` is None for a leaf outside of
    the layers.
    """
    return ".".join(place if layer is None else (*LAYERS, str(layer), *place[len(LAYERS) :]))


def tensor_place(name: str) -> tuple[Place, int | None]:
    """The inverse of `tensor_name`."""
    found = _LAYER_NAME.fullmatch(name)
    return ((*LAYERS, *found[2].split(".")), int(found[1])) if found else (tuple(name.split(".")), None)


def tensor_names(place: Place, layers: int) -> list[str]:
    """The names of all tensors that the leaf at `place` holds: one for each of `layers`, or the one outside
    of them.
    """
    return (
        [tensor_name(place, layer) for layer in range(layers)]
        if is_stacked(place)
        else [tensor_name(place, None)]
    )
