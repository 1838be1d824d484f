"""The time of a compiled TPU program as its compiler expects it: a forecast, not a measurement.

libtpu writes `estimated_cycles`, the figure by which it schedules, beside most instructions of a compiled
program. Their sum over the schedule, each times the number of its runs, is the time of the computation. Four
things have no such figure:

- Pallas kernels (splash attention): the FLOPs of the blocks that they do not skip, at the chip's peak
- collectives: their bytes at the published rate of the links. They run beside the computation, from their
  start to their end in the schedule; the part that is longer than that is exposed
- copies between HBM and the chip's own memory that run beside the computation: left out
- some small instructions: their bytes at the rate of HBM

Left out too: latencies of collectives, the time between programs, and hosts that are late. The estimates
themselves may be wrong: only a run tells.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from babel_jax.hardware import Chip
from babel_jax.tpu.frames import frame_sources
from babel_jax.tpu.hlo import FREE, Program
from babel_jax.tpu.hlo_instruction import Collective, Instruction, called_by

# libtpu 0.0.50 writes a value near 2^63 where it has no estimate.
_MOST_CYCLES = 2**62
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_ASYNC_COPIES = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
_COPIES = {
    "copy",
    "transpose",
    "reshape",
    "slice",
    "pad",
    "concatenate",
    "dynamic-slice",
    "broadcast",
    "bitcast",
}
_COPIES |= {"dynamic-update-slice", "parameter", "tuple", "get-tuple-element", "constant"}
_PRODUCTS = {"convolution", "dot"}
_PALLAS = 'custom_call_target="tpu_custom_call"'
_ALLOCATION = 'custom_call_target="AllocateBuffer"'


class Kind(StrEnum):
    """The kind of a kernel's work."""

    PRODUCTS = "products"
    ATTENTION = "attention"
    COPIES = "copies"
    ELEMENTWISE = "element-wise"
    COLLECTIVES = "collectives"


class Estimate(StrEnum):
    """The source of a kernel's time."""

    COMPILER = "compiler"
    FLOPS = "FLOPs at the peak"
    BYTES = "bytes at the rate of HBM"
    LINKS = "bytes at the rate of the links"


class Kernel(NamedTuple):
    """One instruction of a program that takes time.

    - name: the operation in the traced program; source: file and line of this package, if known
    - times: how often it runs in one run of the program
    - cycles: the compiler's estimate for one run, None if it has none
    - seconds: of all runs. For a collective the exposed part; `hidden` is the rest
    """

    kind: Kind
    name: str
    source: str
    times: int
    cycles: int | None
    seconds: float
    estimate: Estimate
    hidden: float = 0.0


class Forecast(NamedTuple):
    """The kernels of a program, and its asynchronous copies, which are not in `seconds`."""

    kernels: list[Kernel]
    async_copies: int

    @property
    def seconds(self) -> float:
        """The time of one run of the program."""
        return sum(kernel.seconds for kernel in self.kernels)

    def by_kind(self) -> dict[str, float]:
        """The seconds of each kind; of collectives the exposed part."""
        seconds = dict.fromkeys(map(str, Kind), 0.0)
        for kernel in self.kernels:
            seconds[kernel.kind] += kernel.seconds
        return seconds

    def by_estimate(self) -> dict[str, float]:
        """The seconds by the source of the estimate."""
        seconds = dict.fromkeys(map(str, Estimate), 0.0)
        for kernel in self.kernels:
            seconds[kernel.estimate] += kernel.seconds
        return seconds

    def grouped(self) -> list[dict[str, Any]]:
        """Kernels of one kind, name, source and estimate together, the longest first."""
        groups: dict[tuple[str, ...], dict[str, Any]] = {}
        for kernel in self.kernels:
            key = {
                "kind": str(kernel.kind),
                "name": kernel.name,
                "source": kernel.source,
                "estimate": str(kernel.estimate),
            }
            zero = {"times": 0, "cycles": 0, "seconds": 0.0, "hidden": 0.0}
            group = groups.setdefault(tuple(key.values()), key | zero)
            group["times"] += kernel.times
            group["cycles"] += (kernel.cycles or 0) * kernel.times
            group["seconds"] += kernel.seconds
            group["hidden"] += kernel.hidden
        return sorted(groups.values(), key=lambda group: -group["seconds"])

    def described(self) -> dict[str, Any]:
        """The forecast as JSON, without its kernels."""
        return {
            "seconds": self.seconds,
            "by_kind": self.by_kind(),
            "by_estimate": self.by_estimate(),
            "hidden_collectives": sum(kernel.hidden for kernel in self.kernels),
            "async_copies_left_out": self.async_copies,
        }


def clock_of(chip: Chip) -> float:
    """The clock of a chip's tensor cores in Hz: its peak by the FLOPs of its matrix units in a cycle."""
    return chip.bf16 / chip.devices / chip.flops_per_cycle


def forecast_of(
    text: str,
    chip: Chip,
    kernel_flops: Mapping[str, float],
    wire_seconds: Callable[[Collective], float],
) -> Forecast | None:
    """The forecast of a compiled program on one device; None if its text has no estimate at all, as that of
    another compiler.

    text: the HLO text of the compiled program. kernel_flops: the FLOPs of one run of each Pallas kernel, by
    its name. wire_seconds: the seconds of one run of a collective.
    """
    if not any(int(cycles) < _MOST_CYCLES for cycles in _CYCLES.findall(text)):
        return None
    program = Program(text)
    sources = frame_sources(text)
    reader = _Reader(program, chip, kernel_flops, wire_seconds, sources)
    kernels: list[Kernel] = []
    for name, times in program.times.items():
        # The instructions within a fusion are one kernel, which the fusion itself stands for. A collective
        # that runs beside the computation is counted where it is started.
        if name not in program.fused | program.beside:
            kernels += reader.kernels_of(name, times)
    return Forecast(kernels, reader.async_copies)


class _Reader:
    """Reads computations in the order of their schedule, with a clock for the computation and one for the
    links.
    """

    def __init__(
        self,
        program: Program,
        chip: Chip,
        kernel_flops: Mapping[str, float],
        wire_seconds: Callable[[Collective], float],
        sources: Mapping[int, str],
    ):
        self.program, self.chip, self.clock = program, chip, clock_of(chip)
        self.kernel_flops, self.wire_seconds, self.sources = kernel_flops, wire_seconds, sources
        self.async_copies = 0
        self._durations: dict[str, float] = {}

    def kernels_of(self, name: str, times: int) -> list[Kernel]:
        """The kernels of one computation that runs so many times."""
        kernels: list[Kernel] = []
        # `now` is the time in one run. `links` is the time at which the links are free again. `ends` has the
        # end of each collective that was started.
        now = links = 0.0
        ends: dict[str, tuple[float, float, Instruction]] = {}
        shapes = self.program.shapes_of(name)
        for instruction in self.program.computations[name]:
            if instruction.operation == "while":
                now += self.program.trips_of(instruction) * self._duration_of_body(instruction)
                continue
            # The links carry one collective after the other.
            begun = self.program.begun(instruction, shapes)
            if begun is not None:
                collective, key = begun
                seconds = self.wire_seconds(collective)
                links = max(now, links) + seconds
                if key is not None:
                    ends[key] = (links, seconds, instruction)
                else:
                    kernels.append(self._collective(instruction, times, seconds, links - now))
                    now = links
                continue
            ended = self.program.ended(instruction)
            if ended is not None:
                # Exposed is what is left of the collective when the computation needs its result.
                if ended in ends:
                    end, seconds, start = ends.pop(ended)
                    kernels.append(self._collective(start, times, seconds, max(0.0, end - now)))
                    now = max(now, end)
                continue
            kernel = self._kernel(instruction, shapes, times)
            if kernel is not None:
                kernels.append(kernel)
                now += kernel.seconds / times
        self._durations[name] = now
        return kernels

    def _duration_of_body(self, loop: Instruction) -> float:
        (body,) = called_by(loop.rest, "body")
        if body not in self._durations:
            # For its duration alone: the kernels and copies of a body are counted when its turn comes.
            counted = self.async_copies
            self.kernels_of(body, 1)
            self.async_copies = counted
        return self._durations[body]

    def _collective(self, instruction: Instruction, times: int, seconds: float, exposed: float) -> Kernel:
        return Kernel(
            Kind.COLLECTIVES,
            _name(instruction),
            self._source(instruction),
            times,
            None,
            exposed * times,
            Estimate.LINKS,
            max(0.0, seconds - exposed) * times,
        )

    def _kernel(self, instruction: Instruction, shapes: dict[str, str], times: int) -> Kernel | None:
        """The kernel of an instruction, or None if it takes no time of the computation."""
        operation, rest = instruction.operation, instruction.rest
        # They run beside the computation, so they add no time here.
        if operation in _ASYNC_COPIES:
            self.async_copies += times
            return None
        if operation in FREE or operation.endswith("-done") or _ALLOCATION in rest:
            return None
        name, source = _name(instruction), self._source(instruction)
        if _PALLAS in rest:
            flops = _flops_of(f"{instruction.name} {name}", self.kernel_flops)
            seconds = flops / (self.chip.bf16 / self.chip.devices)
            return Kernel(Kind.ATTENTION, name, source, times, None, seconds * times, Estimate.FLOPS)
        kind = self._kind(instruction)
        found = _CYCLES.search(rest)
        if found is not None and int(found.group(1)) < _MOST_CYCLES:
            cycles = int(found.group(1))
            seconds = cycles / self.clock
            return Kernel(kind, name, source, times, cycles, seconds * times, Estimate.COMPILER)
        # No estimate: small instructions, which are bound by memory.
        moved = self.program.moved_by(instruction, shapes)
        if moved == 0:
            return None
        seconds = moved / (self.chip.hbm / self.chip.devices)
        return Kernel(kind, name, source, times, None, seconds * times, Estimate.BYTES)

    def _kind(self, instruction: Instruction) -> Kind:
        inside = {instruction.operation}
        if instruction.operation == "fusion":
            inside = self.program.operations_in(instruction)
        if inside & _PRODUCTS:
            return Kind.PRODUCTS
        return Kind.COPIES if inside <= _COPIES else Kind.ELEMENTWISE

    def _source(self, instruction: Instruction) -> str:
        frame = _FRAME.search(instruction.rest)
        return self.sources.get(int(frame.group(1)), "") if frame else ""


def _name(instruction: Instruction) -> str:
    """The end of the operation's path in the traced program, or the instruction's name."""
    named = _OP_NAME.search(instruction.rest)
    if named is None:
        return re.sub(r"[.\d]+$", "", instruction.name)
    return "/".join(named.group(1).split("/")[-2:])


def _flops_of(name: str, kernel_flops: Mapping[str, float]) -> float:
    for kernel, flops in kernel_flops.items():
        if kernel in name:
            return flops
    return 0.0


def kernels_table(kernels: Sequence[Mapping[str, Any]], limit: int | None = None) -> str:
    """A table of the output of `Forecast.grouped`; at most `limit` lines."""
    total = sum(kernel["seconds"] for kernel in kernels) or 1.0
    lines = [
        f"{'seconds':>9} {'share':>6} {'hidden':>8} {'times':>7} {'cycles':>15}  kind: name, source, estimate"
    ]
    for kernel in kernels[:limit]:
        words = ", ".join(filter(None, (kernel["name"], kernel["source"], kernel["estimate"])))
        lines.append(
            f"{kernel['seconds']:>9.5f} {kernel['seconds'] / total:>6.1%} {kernel['hidden']:>8.4f} "
            f"{kernel['times']:>7,} {kernel['cycles']:>15,}  {kernel['kind']}: {words}"
        )
    return "\n".join(lines)


def forecast_line(forecast: Mapping[str, Any]) -> str:
    """A forecast in one line."""
    kinds = ", ".join(f"{kind} {seconds:.3f}" for kind, seconds in forecast["by_kind"].items() if seconds)
    compiler = forecast["by_estimate"][Estimate.COMPILER] / (forecast["seconds"] or 1.0)
    hidden, left_out = forecast["hidden_collectives"], forecast["async_copies_left_out"]
    return (
        f"the compiler's forecast: {forecast['seconds']:.3f} seconds a run ({kinds}; {hidden:.3f} more of "
        f"collectives run beside products); {compiler:.0%} of the time is the compiler's own estimate, the "
        f"rest is from FLOPs and bytes; {left_out:,} copies that run beside products are left out"
    )
