"""One instruction of a compiled program's text: types and their bytes, operands, the computations that it
calls, and the collective that it is.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# An array type, such as bf16[8,128]{1,0:T(8,128)S(1)}: kind, bits of an element (none for pred), extents, and
# layout.
_ARRAY = re.compile(r"\b(pred|(?:bf|[fsuc])(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
    """One line: `shape` is the type of the result; `rest` is the text from the first operand on."""

    name: str
    shape: str
    operation: str
    rest: str


class Collective(NamedTuple):
    """A collective that runs `times` per step among the devices of `group` (and in other groups of the same
    form); `bytes` are counted for one run.

    A gather counts its result, a scatter its operand, and an all-reduce its operand twice. A collective
    between slices has no group: it goes through the hosts, and each device exchanges with its counterparts in
    the other slices.

    `rings`: the number of rings of devices that it uses at once, None if the text does not say. The two
    directions of a ring count once. A ring takes the links of one dimension, also where it winds through two.
    """

    kind: str
    bytes: int
    times: int
    group: tuple[int, ...]
    rings: int | None = None


def collective_of(
    instruction: Instruction, shapes: dict[str, str], times: int, is_scatter: bool
) -> Collective | None:
    """The collective of an instruction, None for another instruction. is_scatter: an all-reduce is a
    reduce-scatter in fused form: the sums are formed along the ring, and each device keeps its part.
    """
    kind = instruction.operation.removesuffix("-start")
    if kind == "send" and (between := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)):
        kind = between.group(1).lower().replace("_", "-")
        sent = array_bytes(arrays_of(instruction.shape)[0])
        return Collective(kind, 2 * sent if kind == "all-reduce" else sent, times, ())
    if kind not in _COLLECTIVES:
        return None
    operands = [shapes.get(operand, "") for operand in operands_of(instruction.rest)]
    moved = sum(map(array_bytes, operands))
    # A gather's result is what arrives on a device.
    if kind == "all-gather":
        # The type of a start is (operands, results), of a gather at once only the results.
        parts = arrays_of(instruction.shape)
        count = sum(len(arrays_of(operand)) for operand in operands)
        results = parts[count : 2 * count] if instruction.operation.endswith("-start") else parts
        moved = sum(map(array_bytes, results))
    elif kind == "all-reduce":
        kind, moved = ("reduce-scatter", moved) if is_scatter else (kind, 2 * moved)
    # libtpu lists the rings of a collective on the SparseCore, each direction apart.
    directions = instruction.rest.count('"phase_rings":')
    return Collective(kind, moved, times, _group(instruction.rest), (directions + 1) // 2 or None)


def array_bytes(shape: str) -> int:
    """The bytes of an array type, or of all arrays in a tuple type."""
    return sum(_array_size(bits, extents) for _, bits, extents, _ in _ARRAY.findall(shape))


def in_hbm(shape: str) -> int:
    """`array_bytes` without arrays in on-chip memory, S(1) and up."""
    arrays = [(bits, extents) for _, bits, extents, layout in _ARRAY.findall(shape) if "S(" not in layout]
    return sum(_array_size(bits, extents) for bits, extents in arrays)


def _array_size(bits: str, extents: str) -> int:
    """The bytes of an array of elements of so many bits, such as ("16", "8,128"); a pred has a byte."""
    elements = math.prod(int(extent) for extent in extents.split(",") if extent)
    return math.ceil(elements * int(bits or 8) / 8)


def arrays_of(shape: str) -> list[str]:
    """The array types in a type: one, or those of a tuple."""
    return [match.group(0) for match in _ARRAY.finditer(shape)]


def operands_of(rest: str) -> list[str]:
    """The names of an instruction's operands. rest: see `Instruction`."""
    depth, end = 1, len(rest)
    for index, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            end = index
            break
    return re.findall(r"%([\w.\-]+)", rest[:end])


def passed_on(rest: str) -> Iterator[tuple[int, int]]:
    """The numbers of results of a fusion that are an operand, with the number of the operand."""
    if listed := re.search(r"output_to_operand_aliasing=\{(.*?)\)\}", rest):
        # {} is the result of a fusion that has only one.
        for result, operand in re.findall(r"\{(\d*)\}: \((\d+)", listed.group(1)):
            yield int(result or 0), int(operand)


def called_by(rest: str, keys: str) -> list[str]:
    """The computations that an instruction calls under these keys: {a, b} or a single name."""
    names: list[str] = []
    for several, single in re.findall(rf"\b(?:{keys})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", rest):
        names += several.split(",") if several else [single]
    return [name.strip().lstrip("%") for name in names]


def _group(rest: str) -> tuple[int, ...]:
    """The first group of devices of a collective; for a permutation, the first pair of different devices."""
    # A collective-permute.
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        for source, target in re.findall(r"\{(\d+),(\d+)", pairs.group(1) + "}"):
            if source != target:
                return int(source), int(target)
    # Groups as lists: {{0,1},{2,3}}.
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(map(int, match.group(1).split(",")))
    # Groups as a reshaped range of numbers: [2,4]<=[8].
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return tuple(_numbered(match[3], match[4]).reshape(int(match[1]), int(match[2]))[0].tolist())
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        rest,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        numbers = match[2] or ",".join(map(str, sizes.values()))
        ids = _numbered(numbers, match[3]).reshape(*sizes.values())
        # The first group: all places of the axes that are named, and the first of all others.
        index: list[slice | int] = []
        for name in sizes:
            index.append(slice(None) if f"'{name}'" in match[4] else 0)
        return tuple(ids[tuple(index)].flatten().tolist())
    return ()


def _numbered(sizes: str, order: str | None) -> np.ndarray:
    """Devices numbered over axes of these sizes, with the axes then put into an order."""
    dims = [int(size) for size in sizes.split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids
