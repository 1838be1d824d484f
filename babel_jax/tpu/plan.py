"""`babel plan`: what a run's train step would need, move and take on a TPU pod, from the program compiled for it."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babel_jax.config import Config, ModelConfig, Stage
from babel_jax.errors import BadInput
from babel_jax.expansion.apply import expand_config
from babel_jax.expansion.plan import PRESET_SOURCES, plan_from_settings
from babel_jax.hardware import CHIPS, Chip
from babel_jax.model.decoder import count_parameters
from babel_jax.model.flops import model_flops_per_token
from babel_jax.model.parallel import WEIGHT_AXES
from babel_jax.model_folders.folder import open_folder
from babel_jax.tpu.chips import chip_of

log = logging.getLogger("babel")
_GIB = 2**30
_DAY = 86_400


def plan(config: Config, topology: str, slices: int = 1) -> dict[str, Any]:
    """The plan for one topology, its figures per chip and step unless they say otherwise; `fits` says whether it has the memory.

    Raises BadInput for a topology that does not exist, and where mesh, batch and model do not divide.
    """
    chip, shape = chip_of(topology), planned_shape(config)
    if unknown := sorted(set(config.prices) - set(CHIPS)):
        raise BadInput(f"prices: no chip is named {', '.join(unknown)}; valid: {', '.join(CHIPS)}")
    if config.data.seq_len > shape.max_position_embeddings:
        raise BadInput(
            f"data.seq_len = {config.data.seq_len} exceeds the model's max_position_embeddings = {shape.max_position_embeddings}"
        )
    return described(config, shape, topology, slices, chip, _compiled(config, shape, topology, slices))


def planned_shape(config: Config) -> ModelConfig:
    """The shape of the model that is trained: of the model folder where it is there, else of the preset's source; expanded."""
    if config.model.shape is not None:
        base = config.model.shape
    else:
        assert config.model.folder is not None
        preset = config.expansion.preset if config.expansion is not None else None
        if preset in PRESET_SOURCES and not Path(config.model.folder).exists():
            base = PRESET_SOURCES[preset]
        else:
            base = open_folder(config.model.folder).config
    if config.expansion is None:
        return base
    return expand_config(base, plan_from_settings(config.expansion, base.num_hidden_layers))


def _compiled(config: Config, shape: ModelConfig, topology: str, slices: int) -> dict[str, Any]:
    """What `tpu.worker` finds. The compiler is asked in a process of its own, which needs neither TPU nor network."""
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput("babel plan compiles with libtpu, which is not installed: pip install 'babel-jax[tpu]'")
    log.info("compiling the step for %s; a large model takes minutes", topology if slices == 1 else f"{slices} slices of {topology}")
    request = {"config": _plain(config), "shape": _plain(shape), "topology": topology, "slices": slices}
    here = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    here["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**{key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}, **here}
    command = [sys.executable, "-m", "babel_jax.tpu.worker"]
    answer = subprocess.run(command, input=json.dumps(request), env=environment, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"the compiler stopped with status {answer.returncode}:\n{answer.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    if "bad_input" in found:
        raise BadInput(found["bad_input"])
    return found


def _plain(settings: Any) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(settings.model_dump_json(exclude_none=True))
    return plain


def described(config: Config, shape: ModelConfig, topology: str, slices: int, chip: Chip, found: dict[str, Any]) -> dict[str, Any]:
    """The result of `plan`, from what the compiled program was found to be."""
    mesh, training = found["mesh"], config.training
    devices = 1
    for size in mesh.values():
        devices *= size
    chips = devices // chip.devices
    parameters = count_parameters(shape)
    tokens_per_step = training.global_batch_size * config.data.seq_len
    model_flops = model_flops_per_token(shape, config.data.seq_len) * tokens_per_step / chips
    hardware_flops = found["hardware_flops"] * chip.devices
    width = 2 if training.compute_dtype == "bfloat16" else 4
    parts = 1
    for axis in WEIGHT_AXES:
        parts *= mesh[axis]
    # Weights gathered forward and backward, gradients scattered, for every piece of the batch; features stay split.
    minimum = 3 * width * parameters // mesh["tensor"] * training.gradient_accumulation * chip.devices if parts > 1 else 0
    spread = parts * mesh["tensor"]
    per_parameter = {"parameters": 4, "optimizer": 4 + (2 if config.optimizer.first_moment == "bfloat16" else 4), "gradients": 4}
    hbm: dict[str, Any] = {name: size * parameters / spread / _GIB * chip.devices for name, size in per_parameter.items()}
    host = hbm["optimizer"] if training.offload_optimizer_state else 0.0
    hbm["optimizer"] -= host
    hbm["capacity"] = chip.capacity
    result: dict[str, Any] = {
        "topology": topology, "slices": slices, "chips": chips, "mesh": mesh, "parameters": parameters,
        "seq_len": config.data.seq_len, "tokens_per_step": tokens_per_step, "remat": str(training.remat),
        "gradient_accumulation": training.gradient_accumulation, "compile_seconds": round(found["compile_seconds"], 1),
        "model_flops": model_flops, "hardware_flops": hardware_flops, "wire_bytes_minimum": minimum, "host_gib": host,
    }  # fmt: skip
    compute = hardware_flops / chip.bf16
    if short := found.get("out_of_memory"):
        hbm |= {"arguments": None, "temporaries": None, "needs": short["needs"] or None}
        advice = f"needs {short['needs']:.1f} of {short['has'] or chip.capacity:.1f} GiB: try {_advice(config, mesh)}"
        unknown = dict.fromkeys(("wire_bytes", "step_seconds_bound", "mfu_bound", "tokens_per_day", "chip_hours", "bound_by"))
        return result | unknown | {"fits": False, "hbm_gib": hbm, "summary": f"{_head(result, shape)}\n{advice}"}
    hbm |= {name: found[name] / _GIB * chip.devices for name in ("arguments", "temporaries", "peak")}
    hbm["activations"] = max(0.0, hbm["temporaries"] - hbm["gradients"])
    seconds = {"compute": compute, "hbm": found["hbm_bytes"] * chip.devices / chip.hbm} | _wire_seconds(found["collectives"], chip)
    bound = max(seconds.values())
    tokens_per_day = tokens_per_step / bound * _DAY
    stages = [_stage(stage, tokens_per_step, bound, chips, config.prices.get(chip.name)) for stage in config.stages]
    result |= {
        "fits": hbm["arguments"] + hbm["temporaries"] <= chip.capacity,
        "hbm_gib": hbm,
        "collectives": _by_axes(found["collectives"]),
        "wire_bytes": sum(one["bytes"] * one["times"] for one in found["collectives"]) * chip.devices,
        "seconds": seconds,
        "bound_by": max(seconds, key=lambda name: seconds[name]),
        "step_seconds_bound": bound,
        "mfu_bound": model_flops / chip.bf16 / bound,
        "tokens_per_second": tokens_per_step / bound,
        "tokens_per_day": tokens_per_day,
        "stages": stages,
        "chip_hours": sum(stage["chip_hours"] for stage in stages),
    }
    return result | {"summary": _summary(result, shape, chip)}


def _wire_seconds(collectives: Sequence[dict[str, Any]], chip: Chip) -> dict[str, float]:
    """Bounds within slices, where a collective along some dimensions of the torus has their links alone, and between slices."""
    within = between = 0.0
    for one in collectives:
        moved = one["bytes"] * one["times"] * chip.devices
        if one["slices"]:
            between += moved / chip.dcn
        elif one["axes"]:
            within += moved / (chip.ici * max(1, one["dimensions"]) / chip.torus)
    return {"ici": within, "dcn": between}


def _by_axes(collectives: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], list[int]] = {}
    for one in collectives:
        total = sums.setdefault((one["kind"], " x ".join(one["axes"])), [0, 0])
        total[0] += one["bytes"] * one["times"]
        total[1] += one["times"]
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    return [{"kind": kind, "axes": axes, "bytes": moved, "times": times} for (kind, axes), (moved, times) in ordered if axes]


def _stage(stage: Stage, tokens_per_step: int, seconds: float, chips: int, price: float | None) -> dict[str, Any]:
    """The least time and cost of a stage's budget; `max_passes` needs the data and is not looked at."""
    steps = stage.steps or max(1, round((stage.tokens or 0) / tokens_per_step))
    hours = steps * seconds * chips / 3600
    return {
        "name": stage.name, "steps": steps, "tokens": steps * tokens_per_step, "days": steps * seconds / _DAY, "chip_hours": hours,
        "cost": None if price is None else hours * price,
    }  # fmt: skip


def _advice(config: Config, mesh: dict[str, int]) -> str:
    """What would need less, the cheapest first."""
    training, tries = config.training, []
    if training.remat != "full":
        tries.append('training.remat = "full"')
    windows = training.global_batch_size // training.gradient_accumulation
    if windows > mesh["data"] * mesh["fsdp"] * mesh["ring"]:
        tries.append(f"training.gradient_accumulation = {training.gradient_accumulation * 2}")
    if config.data.seq_len % (4 * mesh["context"]) == 0:
        tries.append(f"training.mesh.context = {mesh['context'] * 2}")
    if not training.offload_optimizer_state:
        tries.append("training.offload_optimizer_state = true")
    if config.optimizer.first_moment != "bfloat16":
        tries.append('optimizer.first_moment = "bfloat16"')
    return ", ".join(tries) + ", or more chips"


def _head(result: dict[str, Any], shape: ModelConfig) -> str:
    slices = f"{result['slices']} slices of " if result["slices"] > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    return (
        f"{result['parameters']:,} parameters in {shape.num_hidden_layers} layers on {slices}{result['topology']}, "
        f"{result['chips']:,} chips ({mesh}); {result['tokens_per_step']:,} tokens a step in windows of "
        f"{result['seq_len']:,}, remat {result['remat']}"
    )


def _summary(result: dict[str, Any], shape: ModelConfig, chip: Chip) -> str:
    hbm, seconds = result["hbm_gib"], result["seconds"]
    total = hbm["arguments"] + hbm["temporaries"]
    lines = [
        _head(result, shape),
        f"HBM a chip: {total:.2f} of {hbm['capacity']:.2f} GiB ({'fits' if result['fits'] else 'does not fit'}): arguments "
        f"{hbm['arguments']:.2f} (parameters {hbm['parameters']:.2f}, optimizer {hbm['optimizer']:.2f}), temporaries "
        f"{hbm['temporaries']:.2f} (gradients {hbm['gradients']:.2f}, activations and the rest {hbm['activations']:.2f})",
        f"FLOPs a chip and step: model {result['model_flops']:.4g}, hardware {result['hardware_flops']:.4g} "
        f"({result['hardware_flops'] / result['model_flops']:.3f} x)",
        f"wire a chip and step: {result['wire_bytes'] / 1e9:.2f} GB"
        + (f", {result['wire_bytes'] / result['wire_bytes_minimum']:.3f} x the least of FSDP" if result["wire_bytes_minimum"] else ""),
    ]
    if result["host_gib"]:
        lines.append(f"host memory a chip: {result['host_gib']:.2f} GiB of moments, read and written every step (not in the bound below)")
    for one in result["collectives"]:
        lines.append(f"  {one['kind']:<18} over {one['axes']:<22} {one['bytes'] / 1e9:>9.3f} GB in {one['times']} runs")
    bounds = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    lines += [
        f"seconds a step at the published peaks of {chip.name}, if all overlap: at least {result['step_seconds_bound']:.3f} ({bounds}); "
        f"{result['bound_by']} binds",
        f"model FLOP utilization: at most {result['mfu_bound']:.1%}; {result['tokens_per_second']:,.0f} tokens/s, "
        f"{result['tokens_per_day'] / 1e9:,.1f} G a day",
    ]
    for stage in result["stages"]:
        cost = "" if stage["cost"] is None else f", {stage['cost']:,.0f} at the price given"
        lines.append(
            f"stage {stage['name']}: {stage['steps']:,} steps, {stage['days']:.2f} days, {stage['chip_hours']:,.0f} chip-hours{cost}"
        )
    return "\n".join(lines)
