"""Compiles the train step for a TPU topology and measures the program: a process of its own, as libtpu serves one program at a time.

Reads a request from standard input, writes the findings to standard output; both are one JSON object.
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

from babel_jax.config import Config, ModelConfig
from babel_jax.config.file import parse_settings
from babel_jax.errors import BadInput
from babel_jax.model.decoder import abstract_params
from babel_jax.tpu.flops import program_flops
from babel_jax.tpu.hlo import Program
from babel_jax.training.mesh import batch_sharding, check_batch, make_mesh, replicated
from babel_jax.training.optimizer import AdamW
from babel_jax.training.run_state import abstract_state
from babel_jax.training.step import compiled_step, initial_state, state_shardings


def measured(config: Config, shape: ModelConfig, topology: str, slices: int, keep_text: Path | None = None) -> dict[str, Any]:
    """Memory, FLOPs and collectives of one device, or under `out_of_memory` what the compiler says. Raises BadInput as `make_mesh` does."""
    extra: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        extra["chip_config_name"] = "megacore"  # one device a chip, as on the pods; of the newer chips that is how they are described
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra).devices
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"--topology {topology}: {str(error).splitlines()[0]}") from None
    mesh = make_mesh(config.training.mesh, devices)
    check_batch(mesh, config.training.global_batch_size, config.training.gradient_accumulation, config.data.seq_len)
    params = abstract_params(shape)
    optimizer = AdamW(config.optimizer, params)
    shardings = state_shardings(shape, optimizer, mesh, config.training.offload_optimizer_state)
    state = abstract_state(jax.eval_shape(lambda params: initial_state(optimizer, params), params), shardings)
    windows = config.training.global_batch_size
    batch = {
        name: jax.ShapeDtypeStruct((windows, *rest), jnp.int32, sharding=batch_sharding(mesh))
        for name, rest in (("tokens", (config.data.seq_len,)), ("segment_ids", (config.data.seq_len,)), ("language", ()))
    }
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    step: Any = compiled_step(shape, optimizer, config.optimizer, config.training, mesh)
    traced = step.trace(state, batch, rate)
    found: dict[str, Any] = {
        "mesh": dict(mesh.shape),
        "hardware_flops": program_flops(traced.jaxpr.jaxpr, shape, config.data.seq_len),
    }
    start = time.perf_counter()
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
    program = Program(text)
    flat = list(mesh.devices.flat)
    coordinates = {device.id: (getattr(device, "slice_index", 0), tuple(device.coords)) for device in flat}
    return found | {
        "compile_seconds": time.perf_counter() - start,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "hbm_bytes": program.hbm_bytes(),
        "collectives": [
            {"kind": one.kind, "bytes": one.bytes, "times": one.times, **_spans([flat[place].id for place in one.group], coordinates, mesh)}
            for one in program.collectives()
        ],
    }


def _spans(group: list[int], coordinates: dict[int, tuple[int, tuple[int, ...]]], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Which mesh axes the devices of a group differ in, in how many dimensions of the torus, and whether they are of several slices."""
    if not group:
        return {"axes": ["data"], "dimensions": 0, "slices": True}
    places = {device.id: index for index, device in zip(_indices(mesh), mesh.devices.flat, strict=True)}
    axes = [axis for number, axis in enumerate(mesh.axis_names) if len({places[one][number] for one in group}) > 1]
    within = [coordinates[one][1] for one in group]
    dimensions = sum(len(set(values)) > 1 for values in zip(*within, strict=True))
    return {"axes": axes, "dimensions": dimensions, "slices": len({coordinates[one][0] for one in group}) > 1}


def _indices(mesh: jax.sharding.Mesh) -> list[tuple[int, ...]]:
    return list(np.ndindex(*mesh.devices.shape))


def out_of_hbm(message: str) -> dict[str, float] | None:
    """The GiB that the compiler wanted and had; None where what it says is not that HBM is too small (a kernel may want too much VMEM)."""
    if "RESOURCE_EXHAUSTED" not in message or "memory space vmem" in message:
        return None
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
    sizes = [float(size) * units[unit] for size, unit in re.findall(r"(\d+(?:\.\d+)?)\s?([KMGT])(?:i?B)?\b", message)]
    return {"needs": sizes[0] if sizes else 0.0, "has": sizes[1] if len(sizes) > 1 else 0.0, "message": message.splitlines()[0]}  # type: ignore[dict-item]


def main() -> int:
    """One request, one answer."""
    request = json.load(sys.stdin)
    config = parse_settings(Config, request["config"], "config")
    shape = parse_settings(ModelConfig, request["shape"], "model")
    try:
        found = measured(config, shape, request["topology"], request["slices"], Path(request["hlo"]) if request.get("hlo") else None)
    except BadInput as error:
        found = {"bad_input": str(error)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
