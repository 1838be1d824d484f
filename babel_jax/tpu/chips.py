"""The names of TPU topologies, such as v5p:8x8x8."""

import difflib
import itertools
import math
import re

from babel_jax.errors import BadInput
from babel_jax.hardware import CHIPS, Chip

_LARGEST = {"v4": (16, 16, 16), "v5e": (16, 16), "v5p": (16, 16, 24), "v6e": (16, 16), "tpu7x": (16, 16, 36)}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5p:8x8x8.

    Raises BadInput for a topology that does not exist, with similar ones.
    """
    kind, _, extents = topology.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind.replace("7x", "tpu7x"), CHIPS, n=1, cutoff=0.3)
        # The user may have meant another chip of the same generation: v5 is near v5e and v5p.
        near = [name for name in CHIPS if name in near or name[:2] == kind[:2]] or list(CHIPS)
        raise BadInput(
            f"--topology {topology}: no chip is named {kind!r}; near: {', '.join(near)}; for example "
            "v5p:8x8x8"
        )
    chip = CHIPS[kind]
    if not re.fullmatch(r"\d+(x\d+)*", extents) or len(extents.split("x")) != chip.torus:
        raise BadInput(
            f"--topology {topology}: {kind} has {chip.torus} extents; near: {', '.join(_near(kind, extents))}"
        )

    # 4x4x8 and 8x4x4 are the same slice.
    sizes = tuple(map(int, extents.split("x")))
    if sorted(sizes) not in map(sorted, _slices(kind)):
        raise BadInput(
            f"--topology {topology}: there is no such slice of {kind}; near: "
            f"{', '.join(_near(kind, extents))}"
        )
    return chip


def _slices(kind: str) -> list[tuple[int, ...]]:
    """The extents of existing slices. v5e and v6e: at most twice as long as wide. Others: a part of a cube of
    4x4x4, or whole cubes.
    """
    shapes: list[tuple[int, ...]]
    if CHIPS[kind].torus == 2:
        shapes = [(x, y) for x in (2, 4, 8, 16) for y in (x, 2 * x)]
    else:
        cubes = itertools.combinations_with_replacement(range(4, max(_LARGEST[kind]) + 1, 4), 3)
        shapes = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *cubes]

    # A slice may lie in any direction of the largest torus, so sorted extents are compared.
    largest = sorted(_LARGEST[kind])
    fitting = []
    for shape in shapes:
        if all(size <= most for size, most in zip(sorted(shape), largest, strict=True)):
            fitting.append(shape)
    return fitting


def _near(kind: str, extents: str) -> list[str]:
    """Slices with a similar number of chips; of equally similar ones, the most cubic first."""
    given = re.findall(r"\d+", extents) or ["256"]
    wanted = math.prod(max(1, int(part)) for part in given)

    def distance(shape: tuple[int, ...]) -> tuple[float, int]:
        return abs(math.prod(shape) - wanted) / (math.prod(shape) + wanted), max(shape)

    nearest = sorted(_slices(kind), key=distance)[:4]
    return [f"{kind}:{'x'.join(map(str, shape))}" for shape in nearest]
