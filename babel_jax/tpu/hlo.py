"""The bytes that a compiled program moves, read from its text: every instruction times the number of its
runs.

XLA's cost analysis counts the body of a loop once, but a layer is one iteration of a loop.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

from babel_jax.tpu.hlo_instruction import (
    Collective,
    Instruction,
    array_bytes,
    arrays_of,
    called_by,
    collective_of,
    in_hbm,
    operands_of,
    passed_on,
)

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# Instructions that move no bytes themselves.
FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "call",
    "call-start",
    "after-all",
    "partition-id",
    "iota",
}
# The parts of an asynchronous collective on TPUs.
_START, _DONE = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'
# Fusions that compute while an asynchronous collective runs.
_BESIDE_COLLECTIVE = "async_collective_fusion"
# These start a computation that runs beside the others, such as a collective on a SparseCore.
_CALLS_BESIDE = ("call-start", "async-start")
# These operations read only the part of their first operand that they return.
_READ_IN_PART = {"slice", "dynamic-slice", "gather"}


class Program:
    """The computations of a compiled module, and the number of runs of each."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current, entry = None, ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = header.group(2)
                self.computations[current] = []
                entry = current if header.group(1) else entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                self.computations[current].append(Instruction(*match.groups()))
        self.times: dict[str, int] = defaultdict(int)
        self.fused: set[str] = set()
        # Computations of collectives that run beside the computation that starts them.
        self.beside: set[str] = set()
        self._count(entry, 1)

    def _count(self, name: str, times: int) -> None:
        self.times[name] += times
        for instruction in self.computations[name]:
            if instruction.operation == "while":
                self._count(called_by(instruction.rest, "body")[0], times * self.trips_of(instruction))
                continue
            # Their computation was counted at async-start.
            if instruction.operation in ("async-done", "async-update"):
                continue
            for called in called_by(
                instruction.rest, "calls|to_apply|branch_computations|true_computation|false_computation"
            ):
                if called in self.computations:
                    if instruction.operation == "fusion":
                        self.fused.add(called)
                    if instruction.operation in _CALLS_BESIDE and any(self._collectives_in(called, 1)):
                        self.beside.add(called)
                    if instruction.operation not in (
                        "all-reduce",
                        "reduce-scatter",
                        "reduce",
                        "scatter",
                        "sort",
                        "all-reduce-start",
                    ):
                        self._count(called, times)

    def trips_of(self, loop: Instruction) -> int:
        """The number of iterations of a loop: from its `known_trip_count`, or the largest constant of its
        condition.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known.group(1))
        # The condition compares a counter with the number of iterations, which is a constant in it.
        constants, waiting = [1], called_by(loop.rest, "condition")
        while waiting:
            for instruction in self.computations[waiting.pop()]:
                if instruction.operation == "constant" and (value := re.match(r"(\d+)\)", instruction.rest)):
                    constants.append(int(value.group(1)))
                called = called_by(instruction.rest, "calls")
                waiting += [name for name in called if name in self.computations]
        return max(constants)

    def collectives(self) -> list[Collective]:
        """All collectives. An asynchronous one counts once, at its start."""
        collectives: list[Collective] = []
        for name, times in self.times.items():
            collectives += self._collectives_in(name, times)
        return collectives

    def _collectives_in(self, name: str, times: int) -> Iterator[Collective]:
        instructions = self.computations[name]
        # A computation that only waits for a collective would count it a second time.
        waits = any(_DONE in instruction.rest for instruction in instructions)
        if name.startswith(_BESIDE_COLLECTIVE) or waits:
            return
        shapes = self.shapes_of(name)
        for instruction in instructions:
            collective = collective_of(instruction, shapes, times, name.startswith("all-reduce-scatter"))
            if collective is not None:
                yield collective

    def begun(self, instruction: Instruction, shapes: dict[str, str]) -> tuple[Collective, str | None] | None:
        """The collective that an instruction starts, with the key by which `ended` names its end; the key is
        None if the instruction waits for the end itself.
        """
        # On TPUs a fusion may start a collective and compute beside it.
        if instruction.operation == "fusion":
            (called,) = called_by(instruction.rest, "calls")
            collectives = list(self._collectives_in(called, 1))
            if not collectives:
                return None
            chain = self._chain(called, _START)
            return collectives[0], chain
        if instruction.operation in _CALLS_BESIDE:
            (called,) = called_by(instruction.rest, "calls|to_apply")
            started = next(self._collectives_in(called, 1), None)
            return None if started is None else (started, instruction.name)
        collective = collective_of(instruction, shapes, 1, False)
        if collective is None:
            return None
        waits = not instruction.operation.endswith("-start") and instruction.operation != "send"
        return collective, None if waits else instruction.name

    def ended(self, instruction: Instruction) -> str | None:
        """The key of the collective whose end an instruction waits for."""
        if instruction.operation == "fusion":
            return self._chain(called_by(instruction.rest, "calls")[0], _DONE)
        if instruction.operation.endswith("-done"):
            return next(iter(operands_of(instruction.rest)), None)
        return None

    def _chain(self, name: str, target: str) -> str | None:
        """The chain of an asynchronous collective that a fused computation starts or ends, by `target`."""
        instructions = self.computations[name]
        if not any(target in instruction.rest for instruction in instructions):
            return None
        for instruction in instructions:
            if chain := re.search(r'chain_id="(\d+)"', instruction.rest):
                return f"chain {chain.group(1)}"
        return None

    def shapes_of(self, name: str) -> dict[str, str]:
        """The type of each instruction of a computation."""
        return {instruction.name: instruction.shape for instruction in self.computations[name]}

    def operations_in(self, fusion: Instruction) -> set[str]:
        """The operations within a fusion, and within those in it."""
        operations: set[str] = set()
        waiting = called_by(fusion.rest, "calls")
        while waiting:
            for instruction in self.computations[waiting.pop()]:
                operations.add(instruction.operation)
                if instruction.operation == "fusion":
                    waiting += called_by(instruction.rest, "calls")
        return operations

    def hbm_bytes(self) -> int:
        """The bytes that instructions read from and write to HBM, if only values within fusions stay on the
        chip.
        """
        total = 0
        for name, times in self.times.items():
            if name in self.fused:
                continue
            shapes = self.shapes_of(name)
            for instruction in self.computations[name]:
                total += times * self.moved_by(instruction, shapes)
        return total

    def moved_by(self, instruction: Instruction, shapes: dict[str, str]) -> int:
        """The bytes of `hbm_bytes` in one run of an instruction. shapes: see `shapes_of`."""
        if instruction.operation in FREE or instruction.operation.endswith("-done"):
            return 0
        operands = [shapes.get(operand, "") for operand in operands_of(instruction.rest)]
        if instruction.operation == "dynamic-update-slice":
            return 2 * in_hbm(operands[1])
        if instruction.operation in _READ_IN_PART:
            return 2 * in_hbm(instruction.shape)
        if instruction.operation in ("slice-start", "dynamic-slice-start"):
            # Their type is ((source, ...), slice, context).
            source, *_, sliced, _ = arrays_of(instruction.shape)
            return in_hbm(sliced) + (array_bytes(sliced) if in_hbm(source) else 0)
        if instruction.operation in ("copy-start", "all-gather-start", "collective-permute-start"):
            # The type is a tuple that contains the source.
            return in_hbm(instruction.shape)
        if instruction.operation != "fusion":
            return in_hbm(instruction.shape) + sum(map(in_hbm, operands))
        (called,) = called_by(instruction.rest, "calls")
        results = arrays_of(instruction.shape)
        # A fusion beside which a collective runs takes and returns the collective's buffers.
        if called.startswith(_BESIDE_COLLECTIVE) or self._chain(called, _DONE):
            for result, operand in passed_on(instruction.rest):
                operands[operand] = results[result] = ""
        # A fusion that reads a slice of an operand, for example one layer's weights, moves the slice alone.
        parts = self._parts_read(called)
        read = 0
        for number, shape in enumerate(operands):
            whole = in_hbm(shape)
            read += min(whole, parts.get(number, whole))
        return read + max(0, sum(map(in_hbm, results)) - self._not_written(called))

    def _parts_read(self, name: str) -> dict[int, int]:
        """The bytes read, by parameter number, for parameters that a fused computation only slices or writes
        into.
        """
        inside = self.computations[name]
        parameters = {}
        for instruction in inside:
            if instruction.operation == "parameter":
                parameters[instruction.name] = int(instruction.rest.split(")")[0])

        # The bytes that each user of a parameter reads; None means all.
        users: dict[int, list[int | None]] = defaultdict(list)
        for instruction in inside:
            for number, operand in enumerate(operands_of(instruction.rest)):
                if operand in parameters:
                    size = None
                    if instruction.operation == "fusion":
                        size = self._parts_read(called_by(instruction.rest, "calls")[0]).get(number)
                    elif instruction.operation in _READ_IN_PART and number == 0:
                        size = array_bytes(instruction.shape)
                    elif instruction.operation == "dynamic-update-slice" and number == 0:
                        size = 0
                    users[parameters[operand]].append(size)
        # A parameter with an unknown reader is left out: all of it is read.
        read_in_parts = {}
        for number, sizes in users.items():
            if None not in sizes:
                read_in_parts[number] = sum(size or 0 for size in sizes)
        return read_in_parts

    def _not_written(self, name: str) -> int:
        """The bytes of a fused computation's result that it does not write, because it updates a slice of a
        parameter.
        """
        inside = self.computations[name]
        shapes = {instruction.name: instruction.shape for instruction in inside}
        total = 0
        for instruction in inside:
            if instruction.operation == "fusion":
                total += self._not_written(called_by(instruction.rest, "calls")[0])
            elif instruction.operation == "dynamic-update-slice":
                update = shapes.get(operands_of(instruction.rest)[1], "")
                total += array_bytes(instruction.shape) - array_bytes(update)
        return total
