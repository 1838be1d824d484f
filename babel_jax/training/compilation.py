"""Compiled programs kept on disk from one start of a run to the next, and traces of steps."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Array, PyTree

from babel_jax.distributed.agreement import agreed, meet
from babel_jax.errors import BadInput, one_line
from babel_jax.hardware import name_of_kind
from babel_jax.places import native
from babel_jax.sending import settle

log = logging.getLogger("babel")


@contextlib.contextmanager
def compiled_in(folder: Path) -> Iterator[None]:
    """JAX's compilation cache is in `folder` during the block, or where the user has set it. On several CPU
    devices there is no cache.

    The reason: XLA for CPU loads a program without the order of its collectives. Devices may then wait for
    each other in different collectives, until XLA aborts the process (seen with jax 0.10.2).
    """
    several = jax.default_backend() == "cpu" and jax.device_count() > 1
    if jax.config.values["jax_compilation_cache_dir"] and not several:
        yield
        return
    setting, value = (
        ("jax_enable_compilation_cache", False)
        if several
        else ("jax_compilation_cache_dir", str(native(folder)))
    )
    # Restored afterwards: a library that calls this keeps its own cache.
    before = jax.config.values[setting]
    jax.config.update(setting, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(setting, before)
        compilation_cache.reset_cache()


# Gathers of weights run beside products. Without these options libtpu 0.0.42 waits for each gather on v5p.
_TPU_OPTIONS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    # Without it a small gather over two dimensions of the torus (of the keys' and values' weights) becomes an
    # all-reduce, which waits for the gathers before it.
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
}
# libtpu has continuation fusion, which gathers in the steps of a product, for v5e alone. On other chips
# libtpu 0.0.42 logs that it may give wrong results or hang, and libtpu 0.0.52 refuses the program.
_CONTINUATION_FUSION = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
)
_WITH_CONTINUATION_FUSION = ("v5e",)
# Gathers, and scatters of gradients, run beside products on the SparseCore. Without these options libtpu
# waits for each of them. The last three are how MaxText and axlearn run collectives there.
_SPARSE_CORE_OPTIONS = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_enable_instruction_fusion": False,
    "xla_sc_disable_megacore_partitioning": True,
}
_WITH_SPARSE_CORE = ("v5p", "v6e", "tpu7x")
# KiB of the chip's VMEM that one kernel may use, by chip: three quarters, as MaxText and axlearn have it on
# v6e, in place of libtpu's 16 or 32 MiB. Products in larger tiles read their operands less often.
_SCOPED_VMEM = {"v5e": 98_304, "v5p": 49_152, "v6e": 98_304}


def tpu_options(chip: str | None) -> dict[str, bool | int]:
    """Our options for the train step on TPUs. chip: its name in `hardware.CHIPS`."""
    options: dict[str, bool | int] = dict(_TPU_OPTIONS)
    options |= dict.fromkeys(_CONTINUATION_FUSION, chip in _WITH_CONTINUATION_FUSION)
    if chip in _WITH_SPARSE_CORE:
        options |= _SPARSE_CORE_OPTIONS
    if chip in _SCOPED_VMEM:
        options["xla_tpu_scoped_vmem_limit_kib"] = _SCOPED_VMEM[chip]
    return options


def _options_on(device: jax.Device) -> dict[str, bool | int]:
    """Our options for the train step on devices such as `device`."""
    return tpu_options(name_of_kind(device.device_kind)) if device.platform == "tpu" else {}


def compiled_program(
    lowered: jax.stages.Lowered, device: jax.Device, changes: Mapping[str, bool | int | float | str]
) -> jax.stages.Compiled:
    """The train step compiled for devices such as `device`: on TPUs with our options, and on all platforms
    with `changes`, which is `training.compiler_options`.

    Raises BadInput for an option or a value that the compiler does not know.
    """
    options: dict[str, Any] = {**_options_on(device), **changes}
    try:
        return lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        text = one_line(error, 300)
        if changes and ("No such compile option" in text or "While setting option" in text):
            raise BadInput(f"training.compiler_options: {text}; leave the option out, or mend it") from None
        raise


def compiled_by_all(
    lowered: jax.stages.Lowered, changes: Mapping[str, bool | int | float | str]
) -> jax.stages.Compiled:
    """`compiled_program` for the devices of this job, by all of its processes; they meet afterwards. Else
    devices would wait in a collective operation for a host that still compiles.

    An option that the compiler does not know is told by all processes.
    """
    with agreed():
        compiled = compiled_program(lowered, jax.devices()[0], changes)
    meet()
    return compiled


class Profile:
    """Traces some steps into a folder, for TensorBoard's profile plugin or xprof. Each process writes one
    file.

    The file has the name of the host. Where several processes may run on one host (not on TPU), each process
    has a folder too.
    """

    def __init__(self, folder: Path, steps: range | None):
        if jax.process_count() > 1 and jax.default_backend() != "tpu":
            folder = folder / f"process-{jax.process_index()}"
        self._folder, self._steps, self._running = folder, steps or range(0), False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
        elif self._steps:
            log.warning("--profile %d:%d: none of these steps was done", self._steps.start, self._steps.stop)

    def before(self, step: int) -> None:
        """To be called before a step."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, values: PyTree[Array]) -> None:
        """To be called after a step, with its metrics."""
        if self._running and step >= self._steps.stop - 1:
            # The trace must not end before the devices have finished the last step.
            jax.block_until_ready(values)
            jax.profiler.stop_trace()
            settle(self._folder)
            self._running, self._steps = False, range(0)
            log.info("trace in %s: see it with TensorBoard's profile plugin", self._folder)
