"""`babel plan`: the memory, communication and time of a run's programs on a TPU pod, from each program
compiled for the pod.
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babel_jax.config import Config, ModelConfig, Stage
from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.hardware import CHIPS, Chip
from babel_jax.model.decoder import count_parameters
from babel_jax.model.flops import model_flops_per_token
from babel_jax.model.parallel import WEIGHT_AXES
from babel_jax.tpu.chips import chip_of
from babel_jax.tpu.compiling import Which, compiled_programs
from babel_jax.tpu.costs import (
    advice,
    by_axes,
    described_program,
    hbm_of,
    programs_table,
    seconds_of,
    short_of,
)
from babel_jax.tpu.forecast import forecast_line, kernels_table
from babel_jax.tpu.kinds import STEP
from babel_jax.tpu.shapes import base_of, trained_shape

_GIB = 2**30
_DAY = 86_400
# Of a step that does not fit; the compiler gives no program for it.
_UNKNOWN = (
    "wire_bytes",
    "step_seconds_bound",
    "mfu_bound",
    "tokens_per_day",
    "chip_hours",
    "bound_by",
    "forecast_seconds",
    "forecast_mfu",
)


def plan(
    config: Config,
    topology: str,
    slices: int = 1,
    which: Which = Which.TRAIN,
    configs: Path | None = None,
    kernels: Path | None = None,
) -> dict[str, Any]:
    """The plan for one topology; figures at the top are per chip and step unless the name says otherwise.

    `programs` has the memory and the least time of each program; `fits` is True if all have enough memory.
    configs: the folder of other configs (see `base_of`). kernels: a file for the kernels of the forecast, the
    longest first. Raises BadInput for a topology that does not exist,
    and if mesh, batch and model do not divide.
    """
    chip, base = chip_of(topology), base_of(config, configs)
    shape = trained_shape(config, base.config)
    if unknown := sorted(set(config.prices) - set(CHIPS)):
        raise BadInput(f"prices: no chip is named {', '.join(unknown)}; valid: {', '.join(CHIPS)}")
    if config.data.seq_len > shape.max_position_embeddings:
        raise BadInput(
            f"data.seq_len = {config.data.seq_len} exceeds the model's max_position_embeddings = "
            f"{shape.max_position_embeddings}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput(
            "babel plan compiles with libtpu, which is not installed: pip install 'babel-jax[tpu]'"
        )
    target = topology if slices == 1 else f"{slices} slices of {topology}"
    request = {"which": which, "topology": topology, "slices": slices}
    measurements = compiled_programs(config, base, target, request)
    programs = [described_program(config, of_program, chip) for of_program in measurements]
    if kernels is not None:
        write_text(kernels, _kernels_text(target, measurements))
    # These have no train step, so no time, cost or utilization of one.
    if which in (Which.EVALUATE, Which.REST):
        result = result_without_step(shape, topology, slices, chip, measurements)
    else:
        # The step of the last stage: the model has its full depth there.
        steps = [of_program for of_program in measurements if of_program["kind"] == STEP]
        result = described(config, shape, topology, slices, chip, steps[-1], steps)
    return with_programs(result, programs, which)


def _kernels_text(target: str, measurements: list[dict[str, Any]]) -> str:
    """The kernels of all programs, as tables."""
    parts = [f"The compiler's forecast for {target}. Seconds of collectives are those that nothing hides."]
    for of_program in measurements:
        forecast = of_program.get("forecast")
        parts.append(f"\n{of_program['name']}")
        if forecast is None:
            parts.append("no forecast")
        else:
            parts += [forecast_line(forecast), kernels_table(forecast["kernels"])]
    return "\n".join(parts) + "\n"


def result_without_step(
    shape: ModelConfig, topology: str, slices: int, chip: Chip, measurements: list[dict[str, Any]]
) -> dict[str, Any]:
    """The top part of a plan without a train step."""
    mesh = measurements[0]["mesh"]
    chips = math.prod(mesh.values()) // chip.devices
    parameters = count_parameters(shape)
    target = topology if slices == 1 else f"{slices} slices of {topology}"
    summary = f"{parameters:,} parameters in {shape.num_hidden_layers} layers on {target}, {chips:,} chips"
    return {
        "topology": topology,
        "slices": slices,
        "chips": chips,
        "mesh": mesh,
        "parameters": parameters,
        "summary": summary,
    }


def with_programs(result: dict[str, Any], programs: list[dict[str, Any]], which: Which) -> dict[str, Any]:
    """The result with all programs, `fits` (True if all fit), and their table and advice at the end of its
    summary.
    """
    short = [program for program in programs if not program["fits"]]
    lines = [result["summary"]]
    if which is not Which.STEP:
        lines += ["", programs_table(programs)]
        lines += [short_of(program) for program in short]
        lines.append(
            "all programs fit" if not short else f"{len(short)} of {len(programs)} programs do not fit"
        )
    return result | {"fits": not short, "programs": programs, "summary": "\n".join(lines)}


def described(
    config: Config,
    shape: ModelConfig,
    topology: str,
    slices: int,
    chip: Chip,
    measurements: dict[str, Any],
    steps: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The result of `plan`, from the measurements of the compiled train step.

    steps: the measurements of the train steps of all stages. A stage that trains fewer parameters takes less
    time.
    """
    mesh = measurements["mesh"]
    parameters = count_parameters(shape)
    result: dict[str, Any] = {"topology": topology, "slices": slices}
    result |= _work_of_step(config, shape, chip, measurements, parameters)
    hbm = _hbm_of_state(config, mesh, parameters, chip)
    result["host_gib"] = hbm.pop("host")
    # The compiler gives no program that does not fit, only how much it needs.
    if short := measurements.get("out_of_memory"):
        hbm |= {"arguments": None, "temporaries": None, "needs": short["needs"] or None}
        capacity = short["has"] or chip.capacity
        needs = f"needs {short['needs']:.1f} of {capacity:.1f} GiB: try {advice(config, mesh)}"
        summary = f"{_head(result, shape)}\n{needs}"
        return result | dict.fromkeys(_UNKNOWN) | {"fits": False, "hbm_gib": hbm, "summary": summary}

    hbm |= {name: measurements[name] / _GIB * chip.devices for name in ("arguments", "temporaries", "peak")}
    # Gradients are temporaries too; what is left of them is activations and work space.
    hbm["activations"] = max(0.0, hbm["temporaries"] - hbm["gradients"])
    forecast = measurements.get("forecast")
    expected = None if forecast is None else forecast["seconds"]
    result |= {
        "forecast_seconds": expected,
        "forecast_mfu": None if not expected else result["model_flops"] / chip.bf16 / expected,
        "forecast": forecast and {name: value for name, value in forecast.items() if name != "kernels"},
        "fits": hbm_of(measurements, chip)["total"] <= chip.capacity,
        "hbm_gib": hbm,
        "collectives": by_axes(measurements["collectives"]),
        "wire_bytes": _wire_bytes(measurements) * chip.devices,
    }
    result |= _time_and_cost(config, chip, measurements, result, _bounds_by_stage(steps, chip))
    return result | {"summary": _summary(result, shape, chip)}


def _work_of_step(
    config: Config, shape: ModelConfig, chip: Chip, measurements: dict[str, Any], parameters: int
) -> dict[str, Any]:
    """The sizes of a step, and the least work of a chip in it; they are known even if it does not fit."""
    mesh, training = measurements["mesh"], config.training
    chips = math.prod(mesh.values()) // chip.devices
    tokens_per_step = training.global_batch_size * config.data.seq_len
    return {
        "chips": chips, "mesh": mesh, "parameters": parameters,
        "seq_len": config.data.seq_len, "tokens_per_step": tokens_per_step, "remat": str(training.remat),
        "gradient_accumulation": training.gradient_accumulation,
        "compile_seconds": round(measurements["compile_seconds"], 1),
        "model_flops": model_flops_per_token(shape, config.data.seq_len) * tokens_per_step / chips,
        "hardware_flops": measurements["hardware_flops"] * chip.devices,
        "wire_bytes_minimum": _least_wire(config, mesh, parameters) * chip.devices,
    }  # fmt: skip


def _time_and_cost(
    config: Config,
    chip: Chip,
    measurements: dict[str, Any],
    work: dict[str, Any],
    bounds: dict[str, float],
) -> dict[str, Any]:
    """The least time of a step at the published rates, and the least time and cost of each stage.

    work: of `_work_of_step`. bounds: the least seconds of a step of each stage that was compiled.
    """
    seconds = seconds_of(measurements, chip)
    bound = max(seconds.values())
    price = config.prices.get(chip.name)
    stages = []
    for stage in config.stages:
        of_stage = bounds.get(stage.name, bound)
        stages.append(_stage(stage, work["tokens_per_step"], of_stage, work["chips"], price))
    return {
        "seconds": seconds,
        "bound_by": max(seconds, key=lambda name: seconds[name]),
        "step_seconds_bound": bound,
        "mfu_bound": work["model_flops"] / chip.bf16 / bound,
        "tokens_per_second": work["tokens_per_step"] / bound,
        "tokens_per_day": work["tokens_per_step"] / bound * _DAY,
        "stages": stages,
        "chip_hours": sum(stage["chip_hours"] for stage in stages),
    }


def _wire_bytes(measurements: dict[str, Any]) -> int:
    """The bytes that a device exchanges in a step."""
    total: int = sum(moved["bytes"] * moved["times"] for moved in measurements["collectives"])
    return total


def _bounds_by_stage(steps: Sequence[dict[str, Any]], chip: Chip) -> dict[str, float]:
    """The least seconds of a step of each stage; of a stage with several depths, that of the last one."""
    bounds: dict[str, float] = {}
    for step in steps:
        if "out_of_memory" not in step:
            bounds |= dict.fromkeys(step.get("points", ()), max(seconds_of(step, chip).values()))
    return bounds


def _least_wire(config: Config, mesh: dict[str, int], parameters: int) -> int:
    """The least bytes that a device exchanges in a step: weights are gathered forward and backward, and
    gradients scattered, for every piece of the batch; features stay sharded over `tensor`.
    """
    if math.prod(mesh[axis] for axis in WEIGHT_AXES) == 1:
        return 0
    # Weights and gradients are sent in the type of the run.
    width = 2 if config.training.compute_dtype == "bfloat16" else 4
    return 3 * width * parameters // mesh["tensor"] * config.training.gradient_accumulation


def _hbm_of_state(config: Config, mesh: dict[str, int], parameters: int, chip: Chip) -> dict[str, Any]:
    """GiB of a chip for parameters, gradients and moments, its capacity, and the GiB of moments that wait on
    the host.
    """
    spread = math.prod(mesh[axis] for axis in WEIGHT_AXES) * mesh["tensor"]
    gib_of_byte = parameters / spread / _GIB * chip.devices
    moments = (4 + (2 if config.optimizer.first_moment == "bfloat16" else 4)) * gib_of_byte
    host = moments if config.training.offload_optimizer_state else 0.0
    return {
        "parameters": 4 * gib_of_byte,
        "optimizer": moments - host,
        "gradients": 4 * gib_of_byte,
        "capacity": chip.capacity,
        "host": host,
    }


def _stage(
    stage: Stage, tokens_per_step: int, seconds: float, chips: int, price: float | None
) -> dict[str, Any]:
    """The least time and cost of a stage's budget; `max_passes` is ignored, because it needs the data."""
    steps = stage.steps or max(1, round((stage.tokens or 0) / tokens_per_step))
    hours = steps * seconds * chips / 3600
    return {
        "name": stage.name, "steps": steps, "tokens": steps * tokens_per_step,
        "days": steps * seconds / _DAY, "chip_hours": hours,
        "cost": None if price is None else hours * price,
    }  # fmt: skip


def _head(result: dict[str, Any], shape: ModelConfig) -> str:
    slices = f"{result['slices']} slices of " if result["slices"] > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    return (
        f"{result['parameters']:,} parameters in {shape.num_hidden_layers} layers on "
        f"{slices}{result['topology']}, "
        f"{result['chips']:,} chips ({mesh}); {result['tokens_per_step']:,} tokens a step in windows of "
        f"{result['seq_len']:,}, remat {result['remat']}"
    )


def _summary(result: dict[str, Any], shape: ModelConfig, chip: Chip) -> str:
    hbm, seconds = result["hbm_gib"], result["seconds"]
    total = hbm["arguments"] + hbm["temporaries"]
    lines = [
        _head(result, shape),
        f"HBM a chip: {total:.2f} of {hbm['capacity']:.2f} GiB "
        f"({'fits' if result['fits'] else 'does not fit'}): arguments "
        f"{hbm['arguments']:.2f} (parameters {hbm['parameters']:.2f}, optimizer {hbm['optimizer']:.2f}), "
        "temporaries "
        f"{hbm['temporaries']:.2f} (gradients {hbm['gradients']:.2f}, activations and the rest "
        f"{hbm['activations']:.2f})",
        f"FLOPs a chip and step: model {result['model_flops']:.4g}, hardware {result['hardware_flops']:.4g} "
        f"({result['hardware_flops'] / result['model_flops']:.3f} x)",
        f"wire a chip and step: {result['wire_bytes'] / 1e9:.2f} GB"
        + (
            f", {result['wire_bytes'] / result['wire_bytes_minimum']:.3f} x the least of FSDP"
            if result["wire_bytes_minimum"]
            else ""
        ),
    ]
    if result["host_gib"]:
        lines.append(
            f"host memory a chip: {result['host_gib']:.2f} GiB of moments, read and written every step (not "
            "in the bound below)"
        )
    for moved in result["collectives"]:
        lines.append(
            f"  {moved['kind']:<18} over {moved['axes']:<22} {moved['bytes'] / 1e9:>9.3f} GB in "
            f"{moved['times']} runs"
        )
    bounds = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    lines += [
        f"seconds a step at the published peaks of {chip.name}, if all overlap: at least "
        f"{result['step_seconds_bound']:.3f} ({bounds}); "
        f"{result['bound_by']} binds",
        f"model FLOP utilization: at most {result['mfu_bound']:.1%}; {result['tokens_per_second']:,.0f} "
        "tokens/s, "
        f"{result['tokens_per_day'] / 1e9:,.1f} G a day",
    ]
    if result["forecast"] is not None:
        lines.append(f"{forecast_line(result['forecast'])}; utilization {result['forecast_mfu']:.1%}")
    else:
        lines.append("no forecast: the compiler wrote no estimated cycles")
    for stage in result["stages"]:
        cost = "" if stage["cost"] is None else f", {stage['cost']:,.0f} at the price given"
        lines.append(
            f"stage {stage['name']}: {stage['steps']:,} steps, {stage['days']:.2f} days, "
            f"{stage['chip_hours']:,.0f} chip-hours{cost}"
        )
    return "\n".join(lines)
