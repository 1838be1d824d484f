"""What a compiled program moves, read from its text: every instruction times how often it runs.

XLA's own cost analysis counts the body of a loop once, and a layer is one pass of a loop.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing themselves.
_FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "iota",
}
# What these do not give of their first operand they do not read.
_READ_IN_PART = {"slice", "dynamic-slice", "gather"}


class Instruction(NamedTuple):
    """One line: `shape` is the result's type, `rest` all from the first operand on."""

    name: str
    shape: str
    operation: str
    rest: str


class Collective(NamedTuple):
    """A collective that runs `times` a step, among the devices of `group` (and others alike); `bytes` is what
    one run counts.

    A gather counts its result and a scatter its operand once, an all-reduce its operand twice. One between
    slices has no group: it goes through the hosts, and each device takes part with its fellows of the other
    slices.
    """

    kind: str
    bytes: int
    times: int
    group: tuple[int, ...]


class Program:
    """The computations of a compiled module, and how often each runs."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current, entry = None, ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = header.group(2)
                self.computations[current] = []
                entry = current if header.group(1) else entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                self.computations[current].append(Instruction(*found.groups()))
        self.times: dict[str, int] = defaultdict(int)
        self._fused: set[str] = set()
        self._count(entry, 1)

    def _count(self, name: str, times: int) -> None:
        self.times[name] += times
        for instruction in self.computations[name]:
            if instruction.operation == "while":
                body, condition = (_called(instruction.rest, key)[0] for key in ("body", "condition"))
                self._count(body, times * self._trips(condition))
                continue
            if instruction.operation in ("async-done", "async-update"):
                continue
            for called in _called(
                instruction.rest, "calls|to_apply|branch_computations|true_computation|false_computation"
            ):
                if called in self.computations:
                    if instruction.operation == "fusion":
                        self._fused.add(called)
                    if instruction.operation not in (
                        "all-reduce",
                        "reduce-scatter",
                        "reduce",
                        "scatter",
                        "sort",
                        "all-reduce-start",
                    ):
                        self._count(called, times)

    def _trips(self, condition: str) -> int:
        """The bound that a loop counts to: the largest constant of its condition."""
        constants, waiting = [1], [condition]
        while waiting:
            for instruction in self.computations[waiting.pop()]:
                if instruction.operation == "constant" and (value := re.match(r"(\d+)\)", instruction.rest)):
                    constants.append(int(value.group(1)))
                waiting += [
                    called for called in _called(instruction.rest, "calls") if called in self.computations
                ]
        return max(constants)

    def collectives(self) -> list[Collective]:
        """All that pass between devices. The parts of an asynchronous one count once, where it starts."""
        return [found for name, times in self.times.items() for found in self._collectives_in(name, times)]

    def _collectives_in(self, name: str, times: int) -> Iterator[Collective]:
        instructions = self.computations[name]
        if name.startswith("async_collective_fusion") or any(
            '"AsyncCollectiveDone"' in instruction.rest for instruction in instructions
        ):
            return
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for instruction in instructions:
            kind = instruction.operation.removesuffix("-start")
            if kind == "send" and (
                between := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
            ):
                kind = between.group(1).lower().replace("_", "-")
                sent = array_bytes(_split(instruction.shape)[0])
                yield Collective(kind, 2 * sent if kind == "all-reduce" else sent, times, ())
                continue
            if kind not in _COLLECTIVES:
                continue
            operands = [shapes.get(operand, "") for operand in _operands(instruction.rest)]
            moved = sum(map(array_bytes, operands))
            if kind == "all-gather":
                kind, moved = (
                    "all-gather",
                    max([array_bytes(part) for part in _split(instruction.shape)], default=0),
                )
                if not instruction.shape.startswith("("):
                    moved = array_bytes(instruction.shape)
            elif kind == "all-reduce":
                # A scatter that XLA fused: all of a ring's sums are formed on their way, and each device
                # keeps its part.
                fused = name.startswith("all-reduce-scatter")
                kind, moved = ("reduce-scatter", moved) if fused else (kind, 2 * moved)
            yield Collective(kind, moved, times, _group(instruction.rest))

    def hbm_bytes(self) -> int:
        """What instructions read from and write to HBM, if nothing but what fusions keep inside stayed on the
        chip.
        """
        total = 0
        for name, times in self.times.items():
            if name in self._fused:
                continue
            shapes = {instruction.name: instruction.shape for instruction in self.computations[name]}
            for instruction in self.computations[name]:
                if instruction.operation in _FREE or instruction.operation.endswith("-done"):
                    continue
                total += times * self._moved(instruction, shapes)
        return total

    def _moved(self, instruction: Instruction, shapes: dict[str, str]) -> int:
        operands = [shapes.get(operand, "") for operand in _operands(instruction.rest)]
        if instruction.operation == "dynamic-update-slice":
            return 2 * _in_hbm(operands[1])
        if instruction.operation in _READ_IN_PART:
            return 2 * _in_hbm(instruction.shape)
        if instruction.operation in ("slice-start", "dynamic-slice-start"):
            # Their type is ((source, ...), what is sliced, context).
            source, *_, sliced, _ = _split(instruction.shape)
            return _in_hbm(sliced) + (array_bytes(sliced) if _in_hbm(source) else 0)
        if instruction.operation in ("copy-start", "all-gather-start", "collective-permute-start"):
            return _in_hbm(instruction.shape)  # a tuple with the source in it
        if instruction.operation != "fusion":
            return _in_hbm(instruction.shape) + sum(map(_in_hbm, operands))
        (called,) = _called(instruction.rest, "calls")
        parts = self._parts_read(called)
        read = sum(
            min(_in_hbm(shape), parts.get(number, _in_hbm(shape))) for number, shape in enumerate(operands)
        )
        return read + max(0, _in_hbm(instruction.shape) - self._left_as_it_was(called))

    def _parts_read(self, name: str) -> dict[int, int]:
        """Of those parameters that a fused computation only slices, or writes into, the bytes that it reads,
        by number.
        """
        inside = self.computations[name]
        parameters = {one.name: int(one.rest.split(")")[0]) for one in inside if one.operation == "parameter"}
        users: dict[int, list[int | None]] = defaultdict(list)
        for one in inside:
            for place, operand in enumerate(_operands(one.rest)):
                if operand in parameters:
                    size = None
                    if one.operation == "fusion":
                        size = self._parts_read(_called(one.rest, "calls")[0]).get(place)
                    elif one.operation in _READ_IN_PART and place == 0:
                        size = array_bytes(one.shape)
                    elif one.operation == "dynamic-update-slice" and place == 0:
                        size = 0
                    users[parameters[operand]].append(size)
        return {
            number: sum(size or 0 for size in sizes) for number, sizes in users.items() if None not in sizes
        }

    def _left_as_it_was(self, name: str) -> int:
        """Bytes of the result of a fused computation that it does not write, since it writes into a part of a
        parameter.
        """
        inside = self.computations[name]
        shapes = {one.name: one.shape for one in inside}
        total = 0
        for one in inside:
            if one.operation == "fusion":
                total += self._left_as_it_was(_called(one.rest, "calls")[0])
            elif one.operation == "dynamic-update-slice":
                total += array_bytes(one.shape) - array_bytes(shapes.get(_operands(one.rest)[1], ""))
        return total


def array_bytes(shape: str) -> int:
    """Bytes of an array type, or of all in a tuple of them."""
    return sum(
        _BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes, _ in _ARRAY.findall(shape)
    )


def _in_hbm(shape: str) -> int:
    """`array_bytes` without what the compiler placed in on-chip memory, S(1) and up."""
    return sum(
        _BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes, layout in _ARRAY.findall(shape)
        if "S(" not in layout
    )


def _split(shape: str) -> list[str]:
    return [match.group(0) for match in _ARRAY.finditer(shape)]


def _operands(rest: str) -> list[str]:
    depth, end = 1, len(rest)
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            end = place
            break
    return re.findall(r"%([\w.\-]+)", rest[:end])


def _called(rest: str, keys: str) -> list[str]:
    found = re.findall(rf"\b(?:{keys})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", rest)
    return [
        name.strip().lstrip("%")
        for several, one in found
        for name in (several.split(",") if several else [one])
    ]


def _group(rest: str) -> tuple[int, ...]:
    """The first group of devices that a collective runs among; of a permutation, the
    first pair that differs.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        for one, other in re.findall(r"\{(\d+),(\d+)", pairs.group(1) + "}"):
            if one != other:
                return int(one), int(other)
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(map(int, found.group(1).split(",")))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return tuple(_numbered(found[3], found[4]).reshape(int(found[1]), int(found[2]))[0].tolist())
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        rest,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids = _numbered(found[2] or ",".join(map(str, sizes.values())), found[3]).reshape(*sizes.values())
        return tuple(
            ids[tuple(slice(None) if f"'{name}'" in found[4] else 0 for name in sizes)].flatten().tolist()
        )
    return ()


def _numbered(sizes: str, order: str | None) -> np.ndarray:
    """Devices counted over axes of these sizes, the axes then put into an order."""
    dims = [int(size) for size in sizes.split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids
