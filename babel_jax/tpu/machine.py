"""`babel plan --device`: whether a run fits one machine, and how fast it can be at most.

For NVIDIA cards all programs are compiled, if JAX's plugin for CUDA is installed; no card is needed. Else,
and for the CPU, a model counts what a train step keeps on each device. Its memory is within 10% of that of
all steps of 4,096 tokens a window that were compiled for TPUs, with 9 and 83 billion parameters
(tests/tpu/test_machine.py).
"""

import itertools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from babel_jax.config import Config, ModelConfig, Remat, Stage
from babel_jax.errors import BadInput
from babel_jax.hardware import CHIPS, GPUS, Gpu
from babel_jax.model.decoder import count_parameters
from babel_jax.model.flops import model_flops_per_token
from babel_jax.progress import interval
from babel_jax.tpu.compiling import Which, compiled_programs
from babel_jax.tpu.costs import compute_seconds, described_program, programs_table, short_of
from babel_jax.tpu.cuda import as_chip, has_compiler
from babel_jax.tpu.kinds import STEP
from babel_jax.tpu.shapes import Base, base_of, trained_shape

_GIB = 2**30
_USED = 0.75  # the part of a card's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more
_MOST_USED = 0.92  # the rest is for the driver and libraries
_CPU = "cpu"
DEVICES = (*GPUS, _CPU)
# The weakest first: each keeps less than the one before.
_REMATS = (Remat.NONE, Remat.DOTS, Remat.MLP, Remat.GATE, Remat.PROJECTIONS, Remat.ATTENTION, Remat.FULL)
_RECOMPUTES_ALL = (Remat.ATTENTION, Remat.FULL)
_PIECE_OF_LOGITS = 2**27  # logits at once, in the loss
_COMPILED_PARTS = ("arguments", "temporaries", "results", "total")


class Memory(NamedTuple):
    """The memory of a train step on one device, in GiB."""

    parameters: float
    optimizer: float
    gradients: float
    kept: float  # outputs of layers, for the backward pass
    work: float  # one layer and the loss

    @property
    def total(self) -> float:
        """The sum."""
        return sum(self)


def plan_machine(
    config: Config,
    device: str,
    devices: int = 1,
    configs: Path | None = None,
    which: Which = Which.TRAIN,
    compiles: bool | None = None,
) -> dict[str, Any]:
    """{"device", "devices", "parameters", "fits", "memory_gib", "capacity_gib", "tokens_per_second" (at
    most), "stages", "advice", "method", "summary"} of a run on so many devices of one machine.

    compiles: False takes the model of memory. By default programs are compiled for NVIDIA cards if the
    compiler is installed; `programs` then has each one as `babel plan --topology` gives it, and `memory_gib`
    has the train step's. Raises BadInput if mesh, batch and model do not divide.
    """
    base = base_of(config, configs)
    shape = trained_shape(config, base.config)
    if unknown := sorted(set(config.prices) - {*CHIPS, *DEVICES}):
        valid = ", ".join((*CHIPS, *DEVICES))
        raise BadInput(f"prices: no chip is named {', '.join(unknown)}; valid: {valid}")
    card = _this_machine(config) if device == _CPU else GPUS[device]
    mesh = mesh_of(config, devices)
    _check_batch(config, mesh)
    memory = memory_of(config, shape, mesh, is_cpu=device == _CPU)
    # JAX takes only a part of a card's memory, unless a variable says more.
    usable = card.capacity * (_MOST_USED if device == _CPU else _USED)
    fits = memory.total <= card.capacity * _MOST_USED
    result: dict[str, Any] = {
        "device": device,
        "devices": devices,
        "parameters": count_parameters(shape),
        "fits": fits,
        "memory_gib": memory._asdict() | {"total": memory.total},
        "capacity_gib": card.capacity,
        "seconds": seconds_of_step(config, shape, mesh, card),
        "advice": None if fits else _advice(config, shape, mesh, card, device),
        "method": "model of memory; not compiled",
    }
    if compiles is None:
        compiles = card.cuda is not None and has_compiler()
    if compiles:
        result |= _compiled(config, base, device, devices, which)
    bound = max(result["seconds"].values())
    result["tokens_per_second"] = config.training.global_batch_size * config.data.seq_len / bound
    result["stages"] = [_stage(stage, config, bound, device, devices) for stage in config.stages]
    return result | {"summary": _summary(result, config, shape, card, usable)}


def _stage(stage: Stage, config: Config, seconds: float, device: str, devices: int) -> dict[str, Any]:
    """The least time and cost of a stage's budget, from the least seconds of a step."""
    tokens = config.training.global_batch_size * config.data.seq_len
    steps = stage.steps or max(1, round((stage.tokens or 0) / tokens))
    hours, price = steps * seconds * devices / 3600, config.prices.get(device)
    return {
        "name": stage.name,
        "steps": steps,
        "days": hours / 24 / devices,
        "device_hours": hours,
        "cost": None if price is None else hours * price,
    }


def _compiled(config: Config, base: Base, device: str, devices: int, which: Which) -> dict[str, Any]:
    """The values of the plan that compiled programs change."""
    card, chip = GPUS[device], as_chip(device, GPUS[device].capacity * _MOST_USED)
    request = {"which": which, "device": device, "devices": devices}
    measurements = compiled_programs(config, base, f"{devices} x {card.title}", request)
    programs = [described_program(config, of_program, chip) for of_program in measurements]
    # The figures at the top are those of the train step.
    number = [program["kind"] for program in programs].index(STEP)
    step, tight = programs[number], [program for program in programs if not program["fits"]]
    wire = sum(moved["bytes"] * moved["times"] for moved in measurements[number]["collectives"])
    return {
        "seconds": {
            "compute": compute_seconds(measurements[number], _peak(card, config), card.narrow),
            "memory": measurements[number]["hbm_bytes"] / card.hbm,
            "links": wire / card.link,
        },
        "method": f"compiled by jax {jax.__version__} for CUDA",
        "programs": programs,
        "fits": not tight,
        "memory_gib": {part: step["hbm_gib"][part] for part in _COMPILED_PARTS},
        "advice": tight[0]["advice"] if tight else None,
    }


def mesh_of(config: Config, devices: int) -> dict[str, int]:
    """The sizes of the axes data, fsdp, context and tensor on so many devices.

    Raises BadInput if their product is another number.
    """
    sizes = {axis: config.training.mesh.get(axis, 1) for axis in ("data", "fsdp", "context", "tensor")}
    known = math.prod(size for size in sizes.values() if size > 0)
    for axis, size in sizes.items():
        if size < 0:
            sizes[axis] = devices // known
    if math.prod(sizes.values()) != devices:
        given = ", ".join(f"{axis} = {size}" for axis, size in config.training.mesh.items())
        raise BadInput(
            f"training.mesh ({given}) is not for {devices} device{'s' if devices > 1 else ''}; add "
            "--set training.mesh={fsdp=-1}"
        )
    return sizes


def _check_batch(config: Config, mesh: dict[str, int]) -> None:
    training = config.training
    pieces = training.gradient_accumulation * mesh["data"] * mesh["fsdp"]
    if training.global_batch_size % pieces:
        raise BadInput(
            f"training.global_batch_size = {training.global_batch_size} cannot be divided by {pieces} "
            "(gradient_accumulation times the devices of data and fsdp); set it to a multiple"
        )


def memory_of(config: Config, shape: ModelConfig, mesh: dict[str, int], is_cpu: bool = False) -> Memory:
    """The memory of the last stage's train step on one device; all parameters are trained."""
    training, parts = config.training, mesh["fsdp"] * mesh["context"]
    count, width = count_parameters(shape), 2 if training.compute_dtype == "bfloat16" else 4
    # All devices that have different parameters.
    spread = parts * mesh["tensor"]
    moments = 4 + (2 if config.optimizer.first_moment == "bfloat16" else 4)
    windows = training.global_batch_size / training.gradient_accumulation / mesh["data"] / mesh["fsdp"]
    tokens = windows * config.data.seq_len / mesh["context"]

    # Values of a layer for each token. XLA for CPU drops the barriers that would compute them again.
    embed, inner = shape.hidden_size, shape.intermediate_size
    query = shape.num_attention_heads * shape.head_dim
    key_value = 2 * shape.num_key_value_heads * shape.head_dim
    everything = 6 * embed + 3 * query + 2 * key_value + 4 * inner
    kept = {
        Remat.NONE: everything,
        Remat.DOTS: 3 * embed + query + key_value + 2 * inner,
        Remat.MLP: 2 * embed + 2 * query + key_value + 2 * inner,
        Remat.GATE: 2 * embed + 2 * query + key_value + inner,
        Remat.PROJECTIONS: 2 * embed + 2 * query + key_value,
        Remat.ATTENTION: embed + query,
        Remat.FULL: embed,
    }[Remat.NONE if is_cpu else training.remat]

    table = shape.vocab_size * embed
    tables = table if shape.tie_word_embeddings else 2 * table
    layer = (count - tables) / shape.num_hidden_layers
    # Weights of two layers are gathered at a time, and the table of the loss.
    weights = (2 * layer + table) / mesh["tensor"] * width
    logits = min(tokens * shape.vocab_size, _PIECE_OF_LOGITS) * 4
    work = weights + max(tokens * everything * width, logits)
    if is_cpu:
        # Scores of attention, forward and backward.
        work += 2 * windows * shape.num_attention_heads * config.data.seq_len**2 * 4
    optimizer = 0.0 if training.offload_optimizer_state else moments * count / spread
    return Memory(
        4 * count / spread / _GIB,
        optimizer / _GIB,
        4 * count / spread / _GIB,
        tokens * kept * shape.num_hidden_layers * width / mesh["tensor"] / _GIB,
        work / _GIB,
    )


def seconds_of_step(config: Config, shape: ModelConfig, mesh: dict[str, int], card: Gpu) -> dict[str, float]:
    """The least seconds of a step for products, memory and links, at the peaks of the data sheet."""
    training, devices = config.training, math.prod(mesh.values())
    count, width = count_parameters(shape), 2 if training.compute_dtype == "bfloat16" else 4
    tokens = training.global_batch_size * config.data.seq_len
    flops = model_flops_per_token(shape, config.data.seq_len) * tokens / devices
    if training.remat in _RECOMPUTES_ALL:
        flops *= 4 / 3
    parts = mesh["fsdp"] * mesh["context"]
    # Each piece of the batch reads the weights twice; the optimizer reads and writes parameters and moments,
    # and the gradients are written and read.
    moments = 4 + (2 if config.optimizer.first_moment == "bfloat16" else 4)
    moved = 2 * training.gradient_accumulation * width * count / mesh["tensor"]
    moved += (2 * (4 + moments) + 8) * count / parts / mesh["tensor"]
    # Weights are gathered forward and backward, and gradients are scattered.
    wire = 3 * width * count * training.gradient_accumulation * (parts - 1) / parts / mesh["tensor"]
    return {"compute": flops / _peak(card, config), "memory": moved / card.hbm, "links": wire / card.link}


def _peak(card: Gpu, config: Config) -> float:
    """The FLOP/s of products in the type of the run. XLA multiplies float32 on these cards in TensorFloat-32,
    whose peak is half of bfloat16's (the same data sheets). The peak of a CPU is measured.
    """
    in_float32 = config.training.compute_dtype == "float32" and card.cuda is not None
    return card.bf16 / 2 if in_float32 else card.bf16


def _advice(config: Config, shape: ModelConfig, mesh: dict[str, int], card: Gpu, device: str) -> str:
    """The smallest change with which the step fits, as options of the command."""
    for changed, options in _changes(config, mesh, device):
        if memory_of(changed, shape, mesh, device == _CPU).total <= card.capacity * _MOST_USED:
            return " ".join(f"--set {option}" for option in options)
    fewer = f"a model of fewer parameters or a smaller data.seq_len than {config.data.seq_len}"
    return fewer if device == _CPU else f"{fewer}, or more --devices"


def _changes(config: Config, mesh: dict[str, int], device: str) -> Iterator[tuple[Config, list[str]]]:
    """Configs that need less memory, with the options that make them; those that cost least time first."""
    training = config.training
    # At most one window of each device in a piece.
    most = training.global_batch_size // (mesh["data"] * mesh["fsdp"])
    pieces = [n for n in range(training.gradient_accumulation, most + 1) if most % n == 0]
    remats = [training.remat] if device == _CPU else _REMATS[_REMATS.index(training.remat) :]
    offloads = (training.offload_optimizer_state,) if device == _CPU else (False, True)
    firsts = (config.optimizer.first_moment, "bfloat16")
    for offload, first, remat, number in itertools.product(offloads, firsts, remats, pieces):
        options = []
        if number != training.gradient_accumulation:
            options.append(f"training.gradient_accumulation={number}")
        if remat != training.remat:
            options.append(f"training.remat={remat}")
        if first != config.optimizer.first_moment:
            options.append(f"optimizer.first_moment={first}")
        if offload != training.offload_optimizer_state:
            options.append("training.offload_optimizer_state=true")
        update = {
            "gradient_accumulation": number,
            "remat": remat,
            "offload_optimizer_state": offload or training.offload_optimizer_state,
        }
        yield (
            config.model_copy(
                update={
                    "training": training.model_copy(update=update),
                    "optimizer": config.optimizer.model_copy(update={"first_moment": first}),
                }
            ),
            options,
        )


def _this_machine(config: Config) -> Gpu:
    """The memory of this machine, and the rate of its products, measured in a second."""
    size, dtype = 1024, jnp.dtype(config.training.compute_dtype)
    ones = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(ones, ones))
    # The best of many runs: a busy machine slows down single ones.
    best, end = math.inf, time.monotonic() + 1.0
    while time.monotonic() < end:
        began = time.monotonic()
        jax.block_until_ready(product(ones, ones))
        best = min(best, time.monotonic() - began)
    rate = 2 * size**3 / best
    capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    return Gpu("CPU of this machine", rate, math.inf, math.inf, capacity)


def _summary(result: dict[str, Any], config: Config, shape: ModelConfig, card: Gpu, usable: float) -> str:
    training = config.training
    seconds = ", ".join(f"{name} {value:.3g}" for name, value in result["seconds"].items())
    lines = [
        f"{result['parameters']:,} parameters in {shape.num_hidden_layers} layers on {result['devices']} x "
        f"{card.title}; batches of {training.global_batch_size} windows of {config.data.seq_len:,} tokens in "
        f"{training.gradient_accumulation} pieces, remat {training.remat}",
        _memory_line(result, card, usable),
        f"at most {result['tokens_per_second']:,.0f} tokens/s: seconds of a step at the peaks of the data "
        f"sheet, if all overlap ({seconds}); real runs reach a part of this",
    ]
    for stage in result["stages"]:
        cost = "" if stage["cost"] is None else f", {stage['cost']:,.0f} at the price given"
        lines.append(
            f"stage {stage['name']}: {stage['steps']:,} steps, at least {_time(stage['days'])}, "
            f"{stage['device_hours']:,.1f} device-hours{cost}"
        )
    if "programs" in result:
        tight = [program for program in result["programs"] if not program["fits"]]
        lines += ["", programs_table(result["programs"]), *map(short_of, tight)]
        verdict = "all programs fit" if not tight else f"{len(tight)} of {len(result['programs'])} do not fit"
        lines.append(f"{verdict} ({_MOST_USED:.0%} of a card is counted; the rest is for the driver)")
    elif result["advice"]:
        with_options = result["advice"].startswith("--set")
        lines.append(f"{'fits with' if with_options else 'try'} {result['advice']}")
    return "\n".join(lines)


def _time(days: float) -> str:
    """Days, or for less than one hours, minutes and seconds."""
    return f"{days:.2f} days" if days >= 1 else interval(days * 86_400)


def _memory_line(result: dict[str, Any], card: Gpu, usable: float) -> str:
    """The memory of a train step and whether the run fits, with the method."""
    memory = result["memory_gib"]
    parts = []
    for name, value in memory.items():
        if name != "total" and value is not None:
            parts.append(f"{name} {value:.2f}")
    most = max((program["hbm_gib"]["total"] or 0 for program in result.get("programs", [])), default=0)
    if not result["fits"]:
        verdict = "does not fit"
    elif max(memory["total"], most) <= usable:
        verdict = "fits"
    else:
        verdict = f"fits with the variable XLA_PYTHON_CLIENT_MEM_FRACTION={_MOST_USED}"
    total = "more than the compiler has" if memory["total"] is None else f"{memory['total']:.2f}"
    if "programs" in result:
        by = f"{result['method']}, without a card"
    else:
        by = "by the model of memory, not compiled"
        if card.cuda is not None:
            by += "; to compile, on a machine with or without a card: pip install 'babel-jax[gpu]'"
    return f"memory of a device: {total} of {card.capacity:.1f} GiB, {verdict} ({', '.join(parts)}); {by}"
