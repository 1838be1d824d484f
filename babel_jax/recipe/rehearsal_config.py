"""A run scaled down for a rehearsal: the same mesh axes and settings, small widths, windows and budgets."""

import bisect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from babel_jax.config import Config, ModelConfig, Stage
from babel_jax.config.file import parse_settings
from babel_jax.config.settings import divisors
from babel_jax.errors import BadInput
from babel_jax.model.parallel import AXES, CONTEXT, DATA, FSDP, RING, TENSOR
from babel_jax.training.mesh import check_batch, param_shardings

STEPS = 4  # of each stage: room for two preemptions and a deepening
PREEMPTED_AFTER = (1, 2)  # steps
SEQ_LEN = 64
NEW_TOKENS = 8  # of each language of [vocabulary]
NEW_ROWS = 8  # of the tables of a folder that has a larger vocabulary already
_HEAD_DIM = 8
_ACCUMULATION = 2  # pieces of a batch at the most

Mesh = dict[str, int]


def scaled_mesh(sizes: Mapping[str, int], devices: int, slices: int = 1) -> Mesh:
    """A mesh of so many devices. Its axes are over 1 if those of `sizes` are over 1 on a pod of `slices`
    slices.

    An axis of 6 becomes 2, and one of 9 becomes 3: a divisor of the pod's size. `fsdp` has a ring, as on a
    torus, unless its size is given and below 4. The first axis over 1 gets all remaining devices. Raises
    BadInput if the devices cannot be spread in this way.
    """
    if unknown := sorted(set(sizes) - set(AXES)):
        raise BadInput(f"training.mesh: unknown axis {', '.join(unknown)}; valid axes: {', '.join(AXES)}")
    wanted = {axis: sizes.get(axis, 1) for axis in (DATA, FSDP, CONTEXT, TENSOR)}
    if DATA not in sizes:
        wanted[DATA] = slices

    # The smallest mesh with the same axes over 1.
    scaled = {axis: _least(size) for axis, size in wanted.items()}
    ring = 1
    if scaled[FSDP] > 1 and (wanted[FSDP] == -1 or wanted[FSDP] % 4 == 0) and sizes.get(RING, 2) > 1:
        ring = 2
        scaled[FSDP] = 4
    least = math.prod(scaled.values())
    over_one = [axis for axis in (FSDP, DATA, CONTEXT, TENSOR) if scaled[axis] > 1]
    if devices % least or (devices > least and not over_one):
        names = ", ".join([*over_one, *([RING] if ring > 1 else [])]) or "no axis"
        near = least * max(1, round(devices / least)) if over_one else 1
        raise BadInput(
            f"--devices {devices}: the mesh has {names} over 1, which takes "
            f"{'a multiple of ' if over_one else ''}{least} devices; "
            f"give --devices {near}"
        )
    # All devices are used: the remaining ones extend the first axis over 1.
    if over_one:
        scaled[over_one[0]] *= devices // least
    return {**scaled, RING: ring}


def other_mesh(mesh: Mesh) -> Mesh:
    """Another mesh of the same number of devices, on which the run is resumed."""
    devices = math.prod(size for axis, size in mesh.items() if axis != RING)
    flat = {DATA: 1, FSDP: devices, RING: 1, CONTEXT: 1, TENSOR: 1}
    is_flat = all(mesh[axis] == size for axis, size in flat.items() if axis != RING)
    if not is_flat or devices == 1:
        return flat
    return {**flat, DATA: 2, FSDP: devices // 2}


def check_divides(config: Config, shape: ModelConfig) -> None:
    """Raises BadInput if the mesh sizes of the config do not divide the full-size model or its windows."""
    sizes = {axis: max(1, config.training.mesh.get(axis, 1)) for axis in AXES}
    sizes[FSDP] = max(1, sizes[FSDP] // sizes[RING])
    abstract: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    param_shardings(shape, abstract)
    # The smallest batch that the mesh allows: only windows and parameters are checked here.
    groups = math.prod(sizes[axis] for axis in (DATA, FSDP, RING))
    check_batch(abstract, groups, 1, config.data.seq_len)


def scaled_shape(shape: ModelConfig, mesh: Mesh, vocabulary: int) -> ModelConfig:
    """The model with all its layers, layer types and other settings, and with widths that the mesh divides;
    its vocabulary has room for `vocabulary` tokens.
    """
    devices, tensor = math.prod(size for axis, size in mesh.items() if axis != RING), mesh[TENSOR]
    # Grouped-query attention stays grouped, with at most two query heads for each KV head.
    group = min(2, shape.num_attention_heads // shape.num_key_value_heads)
    kv_heads = math.lcm(tensor, min(2, shape.num_key_value_heads))
    sizes: dict[str, Any] = {
        "vocab_size": math.lcm(64, tensor) * -(-vocabulary // math.lcm(64, tensor)),
        "hidden_size": math.lcm(32, 2 * devices),
        "intermediate_size": math.lcm(64, 2 * devices),
        "num_attention_heads": group * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": _HEAD_DIM,
        "query_pre_attn_scalar": _HEAD_DIM,
        "max_position_embeddings": 4 * SEQ_LEN,
    }
    if shape.sliding_window is not None:
        sizes["sliding_window"] = SEQ_LEN // 4
    return shape.model_copy(update=sizes)


def scaled_vocabulary(config: Config, text: Path, model: Path) -> dict[str, Any]:
    """The settings of `[vocabulary]` with a few tokens, learned from a folder of text. The model is its own
    donor.
    """
    assert config.vocabulary is not None
    settings = config.vocabulary
    changed = {"tokens": NEW_TOKENS * len(settings.languages), "least": 1, "data": str(text)}
    if settings.donor is not None:
        changed["donor"] = str(model)
    return {**settings.model_dump(mode="json", exclude_none=True), **changed}


def scaled_config(
    config: Config,
    mesh: Mesh,
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    vocabulary: Mapping[str, Any] | None,
    out: Path,
) -> Config:
    """The config with a few steps of each stage on `mesh`, with this text, model and vocabulary; other
    settings are unchanged.
    """
    devices = math.prod(size for axis, size in mesh.items() if axis != RING)
    training = config.training
    pieces = min(_ACCUMULATION, training.gradient_accumulation)
    values = config.model_dump(mode="json", exclude_none=True)
    # Only sizes change. The settings that choose between code paths stay, because they are rehearsed.
    values["out"] = str(out)
    values["model"] = dict(model)
    values["data"] = {**values["data"], **data}
    values["training"] |= {
        "global_batch_size": devices * pieces,
        "gradient_accumulation": pieces,
        "mesh": mesh,
        "checkpoint_every": 2 * STEPS,
        "max_skipped_steps": STEPS,
    }
    # Checkpoints come by step alone: the rehearsal resumes at steps that it knows.
    # One process has no local checkpoints.
    for name in ("checkpoint_minutes", "keep_every", "local_checkpoints", "local_checkpoint_every"):
        values["training"].pop(name, None)
    # A few texts, and one evaluation between steps in each stage.
    evaluation = values["evaluation"]
    evaluation |= {"batch_size": devices, "max_bytes": 300, "suite_items": min(1, evaluation["suite_items"])}
    if "every" in evaluation:
        evaluation["every"] = STEPS - 1
    if vocabulary is not None:
        values["vocabulary"] = dict(vocabulary)
        # A larger vocabulary extends the model's own tokenizer.
        values["data"].pop("tokenizer")
    for stage in values["stages"]:
        # A few steps of each stage, whatever its budget.
        stage.pop("tokens", None)
        stage.pop("max_passes", None)
        stage["steps"] = STEPS
        stage["mixture"]["max_epochs"] = 1e6
    for deepening, step in zip(values["deepen"], _deepened_at(config), strict=True):
        deepening["step"] = step
    return parse_settings(Config, values, "rehearsal")


def _deepened_at(config: Config) -> list[int]:
    """The step of the rehearsal for each deepening: one of the last steps of the stage that has it in the
    config.
    """
    starts, start = [], 0
    for stage in config.stages:
        starts.append(start)
        start += _steps(config, stage)
    # The number of the stage of each deepening.
    stages = [max(0, bisect.bisect_right(starts, deepening.step) - 1) for deepening in config.deepen]
    steps = []
    for number, stage_number in enumerate(stages):
        # Several deepenings of one stage come at its last steps, in their order.
        later = stages[number:].count(stage_number)
        if later > STEPS - 2:
            raise BadInput(
                f"deepen: {later} in one stage; a rehearsal has {STEPS} steps of each, room for {STEPS - 2}"
            )
        steps.append(stage_number * STEPS + STEPS - later)
    return steps


def _steps(config: Config, stage: Stage) -> int:
    return stage.steps or max(
        1, round((stage.tokens or 0) / (config.training.global_batch_size * config.data.seq_len))
    )


def _least(size: int) -> int:
    """The size of a mesh axis in the rehearsal: 2 for -1, else the smallest divisor over 1, else 1."""
    if size == -1:
        return 2
    return next((divisor for divisor in divisors(size) if divisor > 1), 1) if size > 1 else 1
