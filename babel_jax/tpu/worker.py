"""Compiles the programs of a run for a TPU topology, or for NVIDIA cards, and measures them. It is a separate
process, because libtpu must be alone in one.

It reads a request from standard input, one JSON object, and writes its results to standard output, a JSON
object a line.
"""

import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from babel_jax.config import Config, MatmulType, ModelConfig
from babel_jax.config.file import parse_settings
from babel_jax.errors import BadInput
from babel_jax.evaluation.benchmarks.evaluate import batch_tokens_on
from babel_jax.hardware import Chip
from babel_jax.tpu.chips import chip_of
from babel_jax.tpu.costs import wire_seconds
from babel_jax.tpu.cuda import card_devices
from babel_jax.tpu.flops import pallas_flops, program_flops
from babel_jax.tpu.forecast import forecast_of
from babel_jax.tpu.hlo import Program as Moved
from babel_jax.tpu.hlo_instruction import Collective
from babel_jax.tpu.kinds import STEP
from babel_jax.tpu.program import Program, copied_bytes, device_bytes
from babel_jax.tpu.programs import evaluation_programs, training_programs
from babel_jax.tpu.shapes import Base, base_from_json, trained_shape
from babel_jax.training.compilation import compiled_program
from babel_jax.training.mesh import make_mesh, mesh_for
from babel_jax.workers import received


def target_devices(request: Mapping[str, Any]) -> list[Any]:
    """The devices to compile for: `devices` cards of the kind `device`, or the chips of `slices` slices of
    the TPU `topology`.

    Raises BadInput for a topology that libtpu does not know.
    """
    if "device" in request:
        return card_devices(request["device"], request["devices"])
    topology, slices = request["topology"], request["slices"]
    extra: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        # One device per chip, as on the pods. Newer chips are described in this way by default.
        extra["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra)
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"--topology {topology}: {str(error).splitlines()[0]}") from None
    return list(described.devices)


def chosen_programs(config: Config, base: Base, mesh: Mesh, which: str) -> list[Program]:
    """The programs that `tpu.plan.Which` names."""
    if which == "evaluate":
        return evaluation_programs(
            trained_shape(config, base.config), mesh, jnp.bfloat16, batch_tokens_on(mesh.size)
        )
    programs = training_programs(config, base, mesh)
    steps = [program for program in programs if program.kind == STEP]
    if which == "step":
        return steps[-1:]
    return [program for program in programs if program.kind != STEP] if which == "rest" else programs


def measure_program(
    program: Program,
    shape: ModelConfig,
    mesh: Mesh,
    chip: Chip | None = None,
    keep_text: Path | None = None,
) -> dict[str, Any]:
    """Memory, FLOPs and collectives of one device; under `out_of_memory`, the compiler's message if the
    program does not fit. With a TPU chip, under `forecast` the compiler's forecast.

    All sizes are in bytes unless the name says otherwise.
    """
    start = time.perf_counter()
    measurements: dict[str, Any] = {
        "kind": program.kind,
        "name": program.name,
        "points": list(program.points),
        "mesh": dict(mesh.shape),
        "beside": device_bytes(program.beside),
    }
    if program.function is None:
        return measurements | _copied(program)
    traced = program.function.trace(*program.arguments, **program.named)
    jaxpr = traced.jaxpr.jaxpr
    measurements["hardware_flops"] = program_flops(jaxpr, shape, program.seq_len)
    narrow = {str(narrow): program_flops(jaxpr, shape, program.seq_len, narrow) for narrow in MatmulType}
    measurements["narrow_flops"] = narrow
    try:
        compiled = _compiled(program, traced, mesh)
    except jax.errors.JaxRuntimeError as error:
        if (short := out_of_hbm(str(error))) is None:
            raise
        return measurements | {"out_of_memory": short, "compile_seconds": time.perf_counter() - start}
    if keep_text is not None:
        keep_text.write_text(compiled.as_text() or "")
    measurements |= measured_program(compiled, traced, shape, mesh, program.seq_len, chip)
    return measurements | {"compile_seconds": time.perf_counter() - start}


def measured_program(
    compiled: Any,
    traced: Any,
    shape: ModelConfig,
    mesh: Mesh,
    seq_len: int,
    chip: Chip | None = None,
) -> dict[str, Any]:
    """Memory in bytes and collectives of one device, from a compiled program and its trace; with a TPU chip,
    the forecast.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    moved_by = Moved(text)
    flat = list(mesh.devices.flat)
    coordinates = {device.id: (getattr(device, "slice_index", 0), _coordinates(device)) for device in flat}

    def described(collective: Collective) -> dict[str, Any]:
        group = [flat[index].id for index in collective.group]
        sizes = {"kind": collective.kind, "bytes": collective.bytes, "times": collective.times}
        spans = _spans(group, coordinates, mesh)
        if collective.rings is not None:
            spans["dimensions"] = min(spans["dimensions"], collective.rings)
        return sizes | spans

    measurements: dict[str, Any] = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        # Only results that do not take the memory of donated arguments.
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "hbm_bytes": moved_by.hbm_bytes(),
        "collectives": list(map(described, moved_by.collectives())),
    }
    if chip is not None:

        def wire(collective: Collective) -> float:
            return sum(wire_seconds([described(collective)], chip).values())

        flops = pallas_flops(traced.jaxpr.jaxpr, shape, seq_len)
        forecast = forecast_of(text, chip, flops, wire)
        measurements["forecast"] = forecast and forecast.described() | {"kernels": forecast.grouped()}
    return measurements


def _copied(program: Program) -> dict[str, Any]:
    """The measurements of a copy to the host and then to the disk, whose time is not estimated."""
    arguments, copied = device_bytes(program.arguments), copied_bytes(program.arguments)
    return {
        "hbm_bytes": arguments + 2 * copied,
        "collectives": [],
        "hardware_flops": 0.0,
        "compile_seconds": 0.0,
        "arguments": arguments,
        "temporaries": copied,
        "results": 0,
    }


def _compiled(program: Program, traced: Any, mesh: Mesh) -> Any:
    """The compiled program; a train step with the options of a run."""
    lowered: jax.stages.Lowered = traced.lower()
    if program.kind != STEP:
        return lowered.compile()
    return compiled_program(lowered, mesh.devices.flat[0], program.compiler_options)


def _spans(
    group: list[int], coordinates: dict[int, tuple[int, tuple[int, ...]]], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """The mesh axes and the number of torus dimensions in which the devices of a group differ, and True if
    they are in several slices.
    """
    if not group:
        return {"axes": ["data"], "dimensions": 0, "slices": True}
    indices = {device.id: index for index, device in zip(_indices(mesh), mesh.devices.flat, strict=True)}
    axes = []
    for number, axis in enumerate(mesh.axis_names):
        if len({indices[device][number] for device in group}) > 1:
            axes.append(axis)
    slices = {coordinates[device][0] for device in group}
    within = [coordinates[device][1] for device in group]
    dimensions = sum(len(set(values)) > 1 for values in zip(*within, strict=True))
    return {"axes": axes, "dimensions": dimensions, "slices": len(slices) > 1}


def _coordinates(device: Any) -> tuple[int, ...]:
    """The place of a chip in the torus of its slice. A card has none: its links are one dimension."""
    return tuple(device.coords) if hasattr(device, "coords") else (device.id,)


def _indices(mesh: jax.sharding.Mesh) -> list[tuple[int, ...]]:
    return list(np.ndindex(*mesh.devices.shape))


def out_of_hbm(message: str) -> dict[str, float] | None:
    """The GiB that the compiler needed and had; None if the message is not about HBM (a kernel may need too
    much VMEM).
    """
    if "RESOURCE_EXHAUSTED" not in message or "memory space vmem" in message:
        return None
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
    # "HLO temporaries (91.47G) exceed available HBM (15.75G)": first what is needed, then what there is.
    sizes = []
    for size, unit in re.findall(r"(\d+(?:\.\d+)?)\s?([KMGT])(?:i?B)?\b", message):
        sizes.append(float(size) * units[unit])
    return {
        "needs": sizes[0] if sizes else 0.0,
        "has": sizes[1] if len(sizes) > 1 else 0.0,
        "message": message.splitlines()[0],  # type: ignore[dict-item]
    }


def _write(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> int:
    """Answers one request: first the names of the programs, then the measurements of each as soon as it is
    compiled.
    """
    request = received()
    config = parse_settings(Config, request["config"], "config")
    base = base_from_json(request["base"])
    which, keep = request["which"], Path(request["hlo"]) if request.get("hlo") else None
    try:
        shape = trained_shape(config, base.config)
        devices = target_devices(request)
        evaluates = which == "evaluate"
        mesh = mesh_for(shape, devices) if evaluates else make_mesh(config.training.mesh, devices)
        programs = chosen_programs(config, base, mesh, which)
        _write({"programs": [program.name for program in programs]})
        chip = None if "device" in request else chip_of(request["topology"])
        for program in programs:
            _write(measure_program(program, shape, mesh, chip, keep))
    except BadInput as error:
        _write({"bad_input": str(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
