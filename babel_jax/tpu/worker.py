"""Compiles the programs of a run for a TPU topology and measures them: a process of its own, as libtpu wants
to be alone in one.

Reads a request from standard input, one JSON object, and writes its findings to standard output, a JSON
object a line.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from babel_jax.config import Config, ModelConfig
from babel_jax.config.file import parse_settings
from babel_jax.errors import BadInput
from babel_jax.evaluation.benchmarks.evaluate import batch_tokens_on
from babel_jax.tpu.flops import program_flops
from babel_jax.tpu.hlo import Program as Moved
from babel_jax.tpu.kinds import STEP
from babel_jax.tpu.programs import Program, copied_bytes, device_bytes, evaluation_programs, training_programs
from babel_jax.tpu.shapes import Base, trained_shape
from babel_jax.training.mesh import make_mesh, mesh_for


def topology_mesh(config: Config, topology: str, slices: int, evaluated: ModelConfig | None = None) -> Mesh:
    """The mesh of the config on a topology, or that of `babel evaluate` for the model `evaluated`.

    Raises BadInput as `make_mesh` does.
    """
    extra: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        extra["chip_config_name"] = (
            "megacore"  # one device a chip, as on the pods; of the newer chips that is how they are described
        )
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra).devices
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"--topology {topology}: {str(error).splitlines()[0]}") from None
    return make_mesh(config.training.mesh, devices) if evaluated is None else mesh_for(evaluated, devices)


def chosen_programs(config: Config, base: Base, mesh: Mesh, which: str) -> list[Program]:
    """Those that `tpu.plan.Which` names."""
    if which == "evaluate":
        return evaluation_programs(
            trained_shape(config, base.config), mesh, jnp.bfloat16, batch_tokens_on(mesh.size)
        )
    programs = training_programs(config, base.config, base.new_layers, mesh)
    steps = [program for program in programs if program.kind == STEP]
    if which == "step":
        return steps[-1:]
    return [program for program in programs if program.kind != STEP] if which == "rest" else programs


def measured(
    program: Program, shape: ModelConfig, mesh: Mesh, keep_text: Path | None = None
) -> dict[str, Any]:
    """Memory, FLOPs and collectives of one device, or under `out_of_memory` what the compiler says.

    Bytes unless it says otherwise.
    """
    start = time.perf_counter()
    found: dict[str, Any]
    if program.function is None:
        found = {
            "kind": program.kind,
            "name": program.name,
            "mesh": dict(mesh.shape),
            "beside": device_bytes(program.beside),
        }
        arguments, copied = device_bytes(program.arguments), copied_bytes(program.arguments)
        # To the host's memory and on to the disk, which says how long that takes.
        moved = {
            "hbm_bytes": arguments + 2 * copied,
            "collectives": [],
            "hardware_flops": 0.0,
            "compile_seconds": 0.0,
        }
        return found | moved | {"arguments": arguments, "temporaries": copied, "results": 0}
    traced = program.function.trace(*program.arguments, **program.named)
    found = {
        "kind": program.kind,
        "name": program.name,
        "mesh": dict(mesh.shape),
        "beside": device_bytes(program.beside),
        "hardware_flops": program_flops(traced.jaxpr.jaxpr, shape, program.seq_len),
    }
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (short := out_of_hbm(str(error))) is None:
            raise
        return found | {"out_of_memory": short, "compile_seconds": time.perf_counter() - start}
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    if keep_text is not None:
        keep_text.write_text(text)
    read = Moved(text)
    flat = list(mesh.devices.flat)
    coordinates = {device.id: (getattr(device, "slice_index", 0), tuple(device.coords)) for device in flat}
    return found | {
        "compile_seconds": time.perf_counter() - start,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        # What is given beside the arguments whose memory it takes over.
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "hbm_bytes": read.hbm_bytes(),
        "collectives": [
            {
                "kind": one.kind,
                "bytes": one.bytes,
                "times": one.times,
                **_spans([flat[place].id for place in one.group], coordinates, mesh),
            }
            for one in read.collectives()
        ],
    }


def _spans(
    group: list[int], coordinates: dict[int, tuple[int, tuple[int, ...]]], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Which mesh axes the devices of a group differ in, in how many dimensions of the torus, and whether they
    are of several slices.
    """
    if not group:
        return {"axes": ["data"], "dimensions": 0, "slices": True}
    places = {device.id: index for index, device in zip(_indices(mesh), mesh.devices.flat, strict=True)}
    axes = [
        axis for number, axis in enumerate(mesh.axis_names) if len({places[one][number] for one in group}) > 1
    ]
    within = [coordinates[one][1] for one in group]
    dimensions = sum(len(set(values)) > 1 for values in zip(*within, strict=True))
    return {"axes": axes, "dimensions": dimensions, "slices": len({coordinates[one][0] for one in group}) > 1}


def _indices(mesh: jax.sharding.Mesh) -> list[tuple[int, ...]]:
    return list(np.ndindex(*mesh.devices.shape))


def out_of_hbm(message: str) -> dict[str, float] | None:
    """The GiB that the compiler wanted and had; None where what it says is not that HBM is too small (a
    kernel may want too much VMEM).
    """
    if "RESOURCE_EXHAUSTED" not in message or "memory space vmem" in message:
        return None
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
    sizes = [
        float(size) * units[unit]
        for size, unit in re.findall(r"(\d+(?:\.\d+)?)\s?([KMGT])(?:i?B)?\b", message)
    ]
    return {
        "needs": sizes[0] if sizes else 0.0,
        "has": sizes[1] if len(sizes) > 1 else 0.0,
        "message": message.splitlines()[0],  # type: ignore[dict-item]
    }


def _tell(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def main() -> int:
    """One request; the names of the programs, then what each was found to be as soon as it is compiled."""
    request = json.load(sys.stdin)
    config = parse_settings(Config, request["config"], "config")
    base = Base(parse_settings(ModelConfig, request["base"], "model"), tuple(request["new_layers"]))
    which, keep = request["which"], Path(request["hlo"]) if request.get("hlo") else None
    try:
        shape = trained_shape(config, base.config)
        evaluated = shape if which == "evaluate" else None
        mesh = topology_mesh(config, request["topology"], request["slices"], evaluated)
        programs = chosen_programs(config, base, mesh, which)
        _tell({"programs": [program.name for program in programs]})
        for program in programs:
            _tell(measured(program, shape, mesh, keep))
    except BadInput as error:
        _tell({"bad_input": str(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
