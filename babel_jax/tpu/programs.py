"""The programs that `babel train` and `babel evaluate` run on the devices, as jitted functions with abstract
arguments.

Each one comes from the function that the run itself jits. Work without a program (reading a checkpoint,
copying tokens to the devices) is not in the list. `babel rehearse` compares the list with the programs that a
run really compiled.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from babel_jax.config import Config, ModelConfig, Stage, Trained
from babel_jax.evaluation.bits_per_byte import longest_window
from babel_jax.evaluation.points import tokens_of_batch
from babel_jax.evaluation.scoring import row_lengths, scoring_program
from babel_jax.evaluation.suite import SUITE_BATCH_TOKENS, SUITE_ROWS, suite_tokens
from babel_jax.expansion.apply import expanding
from babel_jax.expansion.plan import plan_from_settings
from babel_jax.inference.generation import generation_programs
from babel_jax.languages import BABEL
from babel_jax.model.decoder import abstract_params, initializing
from babel_jax.model.parameters import in_type
from babel_jax.model.shapes import is_stacked
from babel_jax.model_folders.resharding import gatherer, mover, reading_steps
from babel_jax.report.samples import sample_tokens
from babel_jax.tpu.kinds import (
    BITS_PER_BYTE,
    CARRYING,
    CHECKPOINT,
    EXPANSION,
    EXPORT,
    GENERATION,
    GROWTH,
    INITIAL,
    LOG_LIKELIHOODS,
    NEW_TOKEN,
    OPTIMIZER,
    PREFILL,
    READING,
    RECHECK,
    REPLICAS,
    SAMPLES,
    STEP,
    SUITE,
)
from babel_jax.tpu.program import Program, merged
from babel_jax.tpu.shapes import Base, growth_of, larger, models_of
from babel_jax.training.deepening import Depth, depth_at
from babel_jax.training.mesh import batch_sharding, check_batch, param_shardings, replicated
from babel_jax.training.parts import check_trained
from babel_jax.training.setup import Setup, carrying_over, setup_of
from babel_jax.training.step import beginning
from babel_jax.vocabulary.growth import Growth, growing

# For benchmarks with generated answers: prompts per device, tokens of a prompt, and new tokens.
BENCHMARK_ROWS, BENCHMARK_PROMPT, BENCHMARK_NEW = 8, 2048, 256


def placed(params: PyTree[Any], shardings: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings,
    )


def training_programs(config: Config, base: Base, mesh: Mesh) -> list[Program]:
    """The programs of `babel train` (or sft) in the order of the run. Programs that compile to the same are
    one, with all their names.

    base: the model that the run begins with. Raises BadInput if mesh, batch and model do not divide, and for
    a stage that trains layers or rows that its model lacks.
    """
    check_batch(
        mesh, config.training.global_batch_size, config.training.gradient_accumulation, config.data.seq_len
    )
    return merged(_training_programs(config, base, mesh))


def _training_programs(config: Config, of_run: Base, mesh: Mesh) -> Iterator[Program]:
    models = models_of(config, of_run)
    for stage, at, _ in planned_parts(config, models):
        check_trained(stage, depth_at(models, at))
    yield from _before_training(config, of_run.config, models[0].config, mesh)
    yield from _training(config, models, mesh)
    yield from _after_training(config, models[-1].config, mesh)


def _before_training(config: Config, base: ModelConfig, first: ModelConfig, mesh: Mesh) -> Iterator[Program]:
    """From the base model to `first`, which the first stage trains: each model is evaluated, but random
    weights are not.
    """
    params = params_on(mesh, base)
    if config.model.folder is None:
        key = jax.eval_shape(lambda: jax.random.key(0))
        yield Program(INITIAL, (), initializing(param_shardings(base, mesh)), (base, key))
    else:
        yield from reading(mesh, base, params)
        # The same order as in `Beginning.make_params`, of which this is the list.
        yield from _measuring(config, "base", base, mesh, params)
        yield from _sampling(config, mesh, base, params, "parent")
    growth, grown = growth_of(config, base), larger(config, base)
    if growth is not None:
        program = growing(param_shardings(grown, mesh))
        yield Program(GROWTH, (), program, (params, *_shapes(growth, mesh)))
        params = params_on(mesh, grown)
        yield from _measuring(config, "extended", grown, mesh, params)
    if config.expansion is not None:
        plan = plan_from_settings(config.expansion, base.num_hidden_layers)
        yield Program(EXPANSION, (), expanding(param_shardings(first, mesh)), (params, plan))
        params = params_on(mesh, first)
        if config.model.folder is not None:
            yield from _measuring(config, "expanded", first, mesh, params)


def _training(config: Config, models: Sequence[Depth], mesh: Mesh) -> Iterator[Program]:
    """The programs of all stages: optimizer, step, checks, checkpoint and evaluation."""
    languages = planned_languages(config)

    # Stages with the same depth and the same trained layers share a setup, and so a program.
    @cache
    def setup_at(start: int, trained: Trained) -> Setup:
        return setup_of(config, mesh, depth_at(models, start), trained, languages)

    before: Setup | None = None
    for stage, at, last_of_stage in planned_parts(config, models):
        setup = setup_at(depth_at(models, at).start, stage.train)
        state = setup.abstract
        # Between stages the optimizer's state is carried over, if the trained layers or the depth change.
        if before is None:
            made = beginning(setup.optimizer, setup.shardings, languages)
            yield Program(OPTIMIZER, (), made, (state.params,))
        elif before is not setup:
            carrying = carrying_over(before, setup, config.optimizer)
            arguments = (before.abstract.params, before.abstract.opt_state)
            yield Program(CARRYING, (_what(setup),), carrying, arguments)
        yield from _step_and_checks(config, setup, mesh, stage.name)
        yield Program(CHECKPOINT, (), None, (state,))
        points = [stage.result] if last_of_stage else []
        if config.evaluation.every is not None:
            points.append("between steps")
        for point in points:
            yield from _measuring(config, point, setup.model.config, mesh, state.params, state.opt_state)
        before = setup


def _step_and_checks(config: Config, setup: Setup, mesh: Mesh, stage: str) -> Iterator[Program]:
    """The train step, and the programs that compare its results to the bit."""
    state, checks = setup.abstract, setup.bit_checks
    step = step_program(config, setup, mesh, stage)
    yield step
    if config.training.recheck_every is not None:
        arguments = (state.params, step.arguments[1])
        yield Program(RECHECK, (stage,), checks.of_gradients, arguments, beside=state.opt_state)
    if checks.has_replicas:
        yield Program(REPLICAS, (), checks.of_params, (state.params,), beside=state.opt_state)


def _after_training(config: Config, last: ModelConfig, mesh: Mesh) -> Iterator[Program]:
    """The export, and samples of the model's text."""
    params = params_on(mesh, last)
    yield Program(EXPORT, ("type",), in_type, (params, jnp.dtype(config.export_dtype)))
    yield from _exporting(mesh, last, params, jnp.dtype(config.export_dtype))
    yield from _sampling(config, mesh, last, params)


def _shapes(growth: Growth, mesh: Mesh) -> tuple[Any, ...]:
    """`Growth.arguments` as shapes; each device has all of them."""
    *arrays, rows = growth.arguments
    shapes = (jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=replicated(mesh)) for one in arrays)
    return (*shapes, rows)


def evaluation_programs(
    config: ModelConfig, mesh: Mesh, dtype: DTypeLike, batch_tokens: int
) -> list[Program]:
    """The programs of `babel evaluate` with parameters of `dtype`: items of 4,096 tokens and of all
    positions, and continuations of BENCHMARK_PROMPT tokens.
    """
    params = params_on(mesh, config, dtype)
    programs = list(reading(mesh, config, params))
    for length in (row_lengths(1)[-1], row_lengths(config.max_position_embeddings)[-1]):
        function, arguments = scoring_program(mesh, config, dtype, params, length, batch_tokens)
        programs.append(Program(LOG_LIKELIHOODS, (f"{length:,} tokens",), function, arguments))
    sizes = (BENCHMARK_ROWS * mesh.size, BENCHMARK_PROMPT, BENCHMARK_NEW)
    return merged([*programs, *_generating((GENERATION,), mesh, config, dtype, params, sizes)])


def planned_languages(config: Config) -> int:
    """How many languages the run has; for a config that names none, as many as the Babel report."""
    return len(config.order) or len(BABEL)


def params_on(
    mesh: Mesh, config: ModelConfig, dtype: DTypeLike = jnp.float32
) -> PyTree[jax.ShapeDtypeStruct]:
    """The parameters as shapes, with their shardings on the mesh."""
    return placed(abstract_params(config, dtype), param_shardings(config, mesh))


def step_program(config: Config, setup: Setup, mesh: Mesh, stage: str) -> Program:
    """The train step of a stage."""
    windows, rest = config.training.global_batch_size, (config.data.seq_len,)
    fields = {"tokens": rest, "segment_ids": rest, "language": ()}
    if config.data.conversations:
        fields["loss_mask"] = rest
    sharding = batch_sharding(mesh)
    batch = {}
    for name, shape in fields.items():
        batch[name] = jax.ShapeDtypeStruct((windows, *shape), jnp.int32, sharding=sharding)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    return Program(
        STEP,
        (stage,),
        setup.step,
        (setup.abstract, batch, rate),
        seq_len=config.data.seq_len,
        compiler_options=config.training.compiler_options,
    )


def reading(mesh: Mesh, config: ModelConfig, params: PyTree[jax.ShapeDtypeStruct]) -> Iterator[Program]:
    """The move of the largest leaf from its sharding for reading to its final one, while all parameters are
    on the devices.
    """
    # The largest leaf is enough: leaves are moved one after the other.
    moves = []
    for place, leaf in traverse_util.flatten_dict(params).items():
        steps = reading_steps(leaf.sharding, leaf.shape, is_stacked(place))
        if not steps[0].is_equivalent_to(steps[-1], len(leaf.shape)):
            move = mover(tuple(steps[1:]), leaf.dtype)
            moves.append((math.prod(leaf.shape), move, leaf.update(sharding=steps[0])))
    if moves:
        _, function, leaf = max(moves, key=lambda move: move[0])
        yield Program(READING, (), function, (leaf,), beside=params)


def _exporting(
    mesh: Mesh, config: ModelConfig, params: PyTree[jax.ShapeDtypeStruct], dtype: np.dtype
) -> Iterator[Program]:
    """Gathers the largest tensor outside the layers, and the largest of one layer, for the process that
    writes it.
    """
    flat = {place: leaf.update(dtype=dtype) for place, leaf in traverse_util.flatten_dict(params).items()}
    beside = (params, list(flat.values()))
    for stacked, tensor in ((False, "embedding"), (True, "a layer's matrix")):
        of_kind = [leaf for place, leaf in flat.items() if is_stacked(place) == stacked]
        leaf = max(of_kind, key=lambda leaf: math.prod(leaf.shape))
        function = gatherer(leaf.sharding, len(leaf.shape), dtype, stacked)
        arguments = (leaf, jax.ShapeDtypeStruct((), jnp.int32))
        yield Program(EXPORT, (tensor,), function, arguments, beside=_without(beside, leaf))


def _without(arrays: Any, leaf: jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
    """All arrays except one that equals `leaf`."""
    leaves = jax.tree.leaves(arrays)
    leaves.remove(leaf)
    return leaves


def _measuring(
    config: Config,
    point: str,
    model: ModelConfig,
    mesh: Mesh,
    params: PyTree[jax.ShapeDtypeStruct],
    beside: Any = (),
) -> Iterator[Program]:
    """Bits per byte and the offline suite at a point of a run."""
    settings, dtype = config.evaluation, config.training.compute_dtype
    longest = longest_window(config.data.seq_len, model.max_position_embeddings, config.data.conversations)
    score = partial(scoring_program, mesh, model, dtype, params, row_lengths(longest)[-1])
    function, arguments = score(tokens_of_batch(config))
    yield Program(BITS_PER_BYTE, (point,), function, arguments, beside=beside)
    # Conversations have no suite: its questions are made from plain text.
    if not settings.suite_items or config.data.conversations:
        return
    function, arguments = score(SUITE_BATCH_TOKENS)
    yield Program(SUITE, (point,), function, arguments, beside=beside)
    if not settings.suite_translations:
        return
    yield from _generating(
        (SUITE, point), mesh, model, dtype, params, (SUITE_ROWS, *suite_tokens(model)), beside=beside
    )


def _sampling(
    config: Config, mesh: Mesh, model: ModelConfig, params: PyTree[jax.ShapeDtypeStruct], *names: str
) -> Iterator[Program]:
    """The programs that write a sample in each language."""
    longest, new = sample_tokens(model)
    sizes = (planned_languages(config), longest, new)
    dtype = config.training.compute_dtype
    yield from _generating((SAMPLES, *names), mesh, model, dtype, params, sizes, sampled=True)


def _generating(
    name: tuple[str, ...],
    mesh: Mesh,
    model: ModelConfig,
    dtype: DTypeLike,
    params: PyTree[jax.ShapeDtypeStruct],
    sizes: tuple[int, int, int],
    sampled: bool = False,
    beside: Any = (),
) -> Iterator[Program]:
    programs = generation_programs(mesh, model, jnp.dtype(dtype), params, *sizes, sampled=sampled)
    for (function, arguments, named), part in zip(programs, (PREFILL, NEW_TOKEN), strict=True):
        yield Program(f"{name[0]}, {part}", name[1:], function, arguments, named, beside)


def planned_parts(config: Config, models: Sequence[Depth]) -> list[tuple[Stage, int, bool]]:
    """Each stage with the first step of each depth within it, and True if that depth is its last.

    Budgets in tokens are computed for windows without padding.
    """
    parts: list[tuple[Stage, int, bool]] = []
    start = 0
    for stage in config.stages:
        tokens_of_step = config.training.global_batch_size * config.data.seq_len
        end = start + (stage.steps or max(1, round((stage.tokens or 0) / tokens_of_step)))
        firsts = [start, *(model.start for model in models if start < model.start < end)]
        parts += [(stage, first, first == firsts[-1]) for first in firsts]
        start = end
    return parts


def _what(setup: Setup) -> str:
    names = {Trained.NEW_LAYERS: "new layers of ", Trained.NEW_ROWS: "new rows of "}
    return f"{names.get(setup.trained, '')}{setup.model.config.num_hidden_layers} layers"
