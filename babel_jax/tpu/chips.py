"""Published peak rates of TPU chips, and the names of topologies."""

import difflib
import itertools
import math
import re
from dataclasses import dataclass

from babel_jax.errors import BadInput


@dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, dense; bytes and FLOPs a second. `ici` is what all its links to other chips carry one way, `dcn` its share
    of its host's network. `capacity` is the HBM, in GiB, that the compiler gives to a program.

    Source: the pages of cloud.google.com/tpu/docs for v4, v5e, v5p, v6e and tpu7x; ici of v5e and v6e is half of the bidirectional figure
    there; dcn is that of the pod by its chips (v5e 6.4 and v6e 25.6 Tbps by 256), else of a 200 Gbps host by 4 chips, of tpu7x 100 Gbps.
    Capacity: what libtpu 0.0.42 says when it runs out; of tpu7x, where that was not seen, the 192 GB published.
    """

    name: str
    bf16: float
    hbm: float
    ici: float
    dcn: float
    capacity: float
    devices: int = 1  # that JAX sees on a chip
    torus: int = 2  # dimensions


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1228e9, 300e9, 6.25e9, 30.75, 1, 3),
        Chip("v5e", 197e12, 819e9, 200e9, 3.125e9, 15.75),
        Chip("v5p", 459e12, 2765e9, 600e9, 6.25e9, 95.74, 1, 3),
        Chip("v6e", 918e12, 1638e9, 400e9, 12.5e9, 31.25),
        Chip("tpu7x", 2307e12, 7380e9, 1200e9, 12.5e9, 178.8, 2, 3),
    )
}
_LARGEST = {"v4": (16, 16, 16), "v5e": (16, 16), "v5p": (16, 16, 24), "v6e": (16, 16), "tpu7x": (16, 16, 36)}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5p:8x8x8. Raises BadInput for one that does not exist, with those that are near."""
    kind, _, extents = topology.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind.replace("7x", "tpu7x"), CHIPS, n=1, cutoff=0.3)
        near = [name for name in CHIPS if name in near or name[:2] == kind[:2]] or list(CHIPS)
        raise BadInput(f"--topology {topology}: no chip is named {kind!r}; near: {', '.join(near)}; for example v5p:8x8x8")
    chip = CHIPS[kind]
    if not re.fullmatch(r"\d+(x\d+)*", extents) or len(extents.split("x")) != chip.torus:
        raise BadInput(f"--topology {topology}: {kind} has {chip.torus} extents; near: {', '.join(_near(kind, extents))}")
    sizes = tuple(map(int, extents.split("x")))
    if sorted(sizes) not in map(sorted, _slices(kind)):
        raise BadInput(f"--topology {topology}: there is no such slice of {kind}; near: {', '.join(_near(kind, extents))}")
    return chip


def _slices(kind: str) -> list[tuple[int, ...]]:
    """The extents of slices that can be had: v5e and v6e up to twice as long as wide, else part of a cube of 4x4x4, or whole cubes."""
    shapes: list[tuple[int, ...]]
    if CHIPS[kind].torus == 2:
        shapes = [(x, y) for x in (2, 4, 8, 16) for y in (x, 2 * x)]
    else:
        cubes = itertools.combinations_with_replacement(range(4, max(_LARGEST[kind]) + 1, 4), 3)
        shapes = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *cubes]
    return [shape for shape in shapes if all(size <= most for size, most in zip(sorted(shape), sorted(_LARGEST[kind]), strict=True))]


def _near(kind: str, extents: str) -> list[str]:
    """Slices whose number of chips is near; of those alike in that, the most like a cube first."""
    wanted = math.prod(max(1, int(part)) for part in re.findall(r"\d+", extents) or ["256"])

    def distance(shape: tuple[int, ...]) -> tuple[float, int]:
        return abs(math.prod(shape) - wanted) / (math.prod(shape) + wanted), max(shape)

    return [f"{kind}:{'x'.join(map(str, shape))}" for shape in sorted(_slices(kind), key=distance)[:4]]
