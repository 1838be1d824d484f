"""Times the train step of candidates on the devices at hand: the compiled program of a run, with random
tokens and weights.

Each visit of a candidate takes some steps without a clock, then the steps that count. As in a run, the next
step is sent to the devices before the values of the last one are read, so that they never wait for the host;
the time of a step is the time between two arrivals. Only one state is in memory: the programs of all
candidates take the same one, unless their shardings differ.
"""

import functools
import gc
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from babel_jax.config import Config, Stage
from babel_jax.distributed import cluster
from babel_jax.distributed.agreement import texts_of_all
from babel_jax.errors import BadInput, one_line
from babel_jax.hardware import CHIPS, GPUS, Chip, name_of_kind
from babel_jax.model.decoder import initializing
from babel_jax.progress import working
from babel_jax.tpu.costs import seconds_of
from babel_jax.tpu.cuda import as_chip
from babel_jax.tpu.flops import program_flops
from babel_jax.tpu.program import device_bytes
from babel_jax.tpu.programs import planned_languages, step_program
from babel_jax.tpu.worker import measured_program, out_of_hbm
from babel_jax.training.compilation import compiled_by_all
from babel_jax.training.deepening import Depth
from babel_jax.training.mesh import check_batch, everywhere, global_batch, make_mesh, window_share
from babel_jax.training.setup import Setup, setup_of
from babel_jax.training.step import TrainState, placed_state
from babel_jax.tuning.candidates import Candidate

log = logging.getLogger("babel")

OUT_OF_MEMORY = "out of memory"  # begins the message of a candidate that needs more than there is
STEPS_BEFORE = 2  # of each visit: not counted
_GIB = 2**30
_CACHE_HITS = "/jax/compilation_cache/cache_hits"
_MOST_FAILURE = 300  # characters
Result = TypeVar("Result")


class Failed(Exception):
    """A candidate that does not run, on all processes. `is_memory`: it needs more memory than there is."""

    def __init__(self, message: str, is_memory: bool = False):
        super().__init__(message)
        self.is_memory = is_memory


class Built(NamedTuple):
    """A compiled candidate, and what is known of its program (the keys of a line of measurements.jsonl)."""

    setup: Setup
    mesh: Mesh
    program: Any
    arguments: tuple[Any, ...]
    known: dict[str, Any]


def chip_at_hand() -> Chip | None:
    """The published rates of the devices at hand; None if these tables do not have them (a CPU)."""
    name = name_of_kind(jax.devices()[0].device_kind)
    if name in GPUS:
        return as_chip(name, GPUS[name].capacity)
    return CHIPS[name] if name is not None else None


def device_capacity() -> int:
    """The bytes of memory that one device gives to programs: as the device says, or for a CPU the memory of
    this machine by its devices.
    """
    stats = _memory_stats()
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // jax.local_device_count()


def _memory_stats() -> dict[str, Any]:
    return jax.local_devices()[0].memory_stats() or {}


class Bench:
    """The candidates of one stage, built when they are first visited.

    Programs stay loaded until one runs out of memory: then all others are dropped, and this one is tried
    again, alone.
    """

    def __init__(self, stage: Stage, model: Depth):
        self._stage, self._model, self._chip = stage, model, chip_at_hand()
        # All processes must come to the same verdict.
        self._capacity = min(map(int, texts_of_all(str(device_capacity()))))
        self._built: dict[str, Built] = {}
        self._state: TrainState | None = None
        self._state_of: Setup | None = None
        self._batches: dict[Mesh, dict[str, Array]] = {}

    def visit(self, candidate: Candidate, steps: int) -> dict[str, Any]:
        """{"step_seconds", "device_peak_gib"} of one visit, and the values of `Built.known`.

        Raises Failed, on all processes, if the candidate does not run.
        """
        built = self._program_of(candidate)
        try:
            return built.known | _by_all(lambda: self._timed(built, steps))
        except Failed as failed:
            self._drop()
            if not failed.is_memory:
                raise
        # Memory may be in pieces, or be taken by the other programs.
        log.info("%s: out of memory; once more, alone", candidate.name)
        built = self._program_of(candidate)
        try:
            return built.known | _by_all(lambda: self._timed(built, steps))
        except Failed:
            self._drop()
            raise

    def _drop(self) -> None:
        """Frees the memory of all programs and of the state: a step that failed may have used it up."""
        self._built.clear()
        self._state = self._state_of = None
        gc.collect()

    def _program_of(self, candidate: Candidate) -> Built:
        if candidate.key not in self._built:
            with working(f"compiling {candidate.name}"):
                self._built[candidate.key] = _by_all(lambda: self._build(candidate.config))
        return self._built[candidate.key]

    def _build(self, config: Config) -> Built:
        """Compiles the step. Raises Failed if the compiler says that it needs more memory than a device has;
        on GPUs that would be found out in the middle of a step, by some of the processes.
        """
        mesh, training = make_mesh(config.training.mesh), config.training
        check_batch(mesh, training.global_batch_size, training.gradient_accumulation, config.data.seq_len)
        window_share(mesh)
        # The same setup and step as a run has, so that the measured program is the one that will run.
        setup = setup_of(config, mesh, self._model, self._stage.train, planned_languages(config))
        # Before the compiler, which may take minutes for a program that cannot fit.
        self._check_memory(device_bytes(setup.abstract), "parameters and moments take")
        program = step_program(config, setup, mesh, self._stage.name)

        began, hits = time.monotonic(), _cache_hits()
        traced = program.function.trace(*program.arguments)
        compiled = compiled_by_all(traced.lower(), training.compiler_options)
        seconds = time.monotonic() - began

        needs = _program_bytes(compiled)
        self._check_memory(needs or 0, "the step takes")
        known = {
            "compile_seconds": round(seconds, 2),
            "compiled_before": _cache_hits() > hits,
            "program_gib": None if needs is None else needs / _GIB,
        }
        known |= self._expected(compiled, traced, mesh, config)
        return Built(setup, mesh, compiled, program.arguments, known)

    def _check_memory(self, needs: int, what: str) -> None:
        if needs > self._capacity:
            raise Failed(
                f"{OUT_OF_MEMORY}: {what} {needs / _GIB:.2f} of {self._capacity / _GIB:.2f} GiB",
                is_memory=True,
            )

    def _expected(self, compiled: Any, traced: Any, mesh: Mesh, config: Config) -> dict[str, Any]:
        """{"forecast_seconds", "bound_seconds"}: the compiler's own forecast (libtpu gives one), and the
        least seconds at the published rates; None where there is none.
        """
        expected: dict[str, Any] = {"forecast_seconds": None, "bound_seconds": None}
        if self._chip is None:
            return expected
        chip, shape, seq_len = self._chip, self._model.config, config.data.seq_len
        with_cycles = chip if chip.flops_per_cycle else None
        try:
            found = measured_program(compiled, traced, shape, mesh, seq_len, with_cycles)
        except Exception as error:  # a text of a newer compiler: the measurement is worth more
            log.warning("no forecast: the compiled text cannot be read (%s)", one_line(error, _MOST_FAILURE))
            return expected
        found["hardware_flops"] = program_flops(traced.jaxpr.jaxpr, shape, seq_len)
        forecast = found.get("forecast")
        return {
            "forecast_seconds": None if forecast is None else forecast["seconds"],
            "bound_seconds": max(seconds_of(found, chip).values()),
        }

    def _timed(self, built: Built, steps: int) -> dict[str, Any]:
        batch = self._batch(built)
        # With a rate of 0 the weights stay as they are, and random text cannot make them diverge.
        rate = everywhere(np.float32(0.0), built.mesh)
        state, peak = self._take_state(built.setup), _memory_stats().get("peak_bytes_in_use", 0)
        # The values of a step are read when the next one has been sent.
        arrivals: list[float] = []
        waiting: dict[str, Array] | None = None
        for _ in range(STEPS_BEFORE + steps):
            state, values = built.program(state, batch, rate)
            if waiting is not None:
                jax.device_get(waiting)
                arrivals.append(time.monotonic())
            waiting = values
        jax.device_get(waiting)
        arrivals.append(time.monotonic())
        self._state, self._state_of = state, built.setup
        now = _memory_stats().get("peak_bytes_in_use", 0)
        counted = np.diff(arrivals)[STEPS_BEFORE - 1 :]
        return {
            "step_seconds": [round(float(seconds), 6) for seconds in counted],
            # The device tells the peak since the start of the process: it is this program's if it rose.
            "device_peak_gib": now / _GIB if now > peak else None,
        }

    def _take_state(self, setup: Setup) -> TrainState:
        """A state for the setup. It is used up by the next step."""
        # Without a reference from here, so that a state that is not used is freed before another one is made.
        state, of, self._state, self._state_of = self._state, self._state_of, None, None
        if state is not None and of is not None and _same(of.abstract, setup.abstract):
            return state
        del state
        gc.collect()
        params = initializing(setup.shardings.params)(setup.model.config, jax.random.key(0))
        languages = setup.abstract.windows_seen.shape[0]
        return placed_state(setup.optimizer, params, setup.shardings, languages)

    def _batch(self, built: Built) -> dict[str, Array]:
        if built.mesh not in self._batches:
            share, shares = window_share(built.mesh)
            random = np.random.default_rng(share)
            own = {}
            for name, shape in built.arguments[1].items():
                rows = (shape.shape[0] // shares, *shape.shape[1:])
                high = self._model.config.vocab_size if name == "tokens" else 1
                # One document a window, of the first language; in conversations all tokens have a loss.
                values = random.integers(0, high, rows, dtype=np.int32)
                own[name] = np.ones_like(values) if name in ("segment_ids", "loss_mask") else values
            self._batches = {built.mesh: global_batch(own, built.mesh)}
        return self._batches[built.mesh]


def _program_bytes(compiled: jax.stages.Compiled) -> int | None:
    """The memory of a device that a program needs, its arguments included; None if the compiler does not
    tell.
    """
    # Results that take the memory of donated arguments need none of their own.
    memory: Any = compiled.memory_analysis()
    if memory is None:
        return None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes + results)


def _same(left: TrainState, right: TrainState) -> bool:
    """True for states of the same shapes, types and shardings."""
    return bool(jax.tree.flatten(left) == jax.tree.flatten(right))


@functools.cache
def _hits_of_cache() -> list[str]:
    """The hits of JAX's compilation cache since the first call, as a list that grows."""
    hits: list[str] = []

    def hear(event: str, **_: Any) -> None:
        if event == _CACHE_HITS:
            hits.append(event)

    jax.monitoring.register_event_listener(hear)
    return hits


def _cache_hits() -> int:
    return len(_hits_of_cache())


def _by_all(do: Callable[[], Result]) -> Result:
    """The value of `do()`. If it raises on one process, all raise Failed; what a lost process causes is
    raised as it is.
    """
    result, failure = None, ""
    try:
        result = do()
    except Failed as failed:
        failure = f"memory {failed}" if failed.is_memory else f"other {failed}"
    except Exception as error:
        if cluster.lost_process(error) is not None:
            raise
        text = one_line(error, _MOST_FAILURE)
        if out_of_hbm(str(error)) is not None or isinstance(error, MemoryError):
            failure = f"memory {OUT_OF_MEMORY}: {text}"
        else:
            failure = f"other {text if isinstance(error, BadInput) else f'{type(error).__name__}: {text}'}"
    # The first one that failed says why. No exception is kept: its frames hold arrays.
    failures = [text for text in texts_of_all(failure) if text]
    if failures:
        kind, _, message = failures[0].partition(" ")
        raise Failed(message, is_memory=kind == "memory")
    return result  # type: ignore[return-value]
