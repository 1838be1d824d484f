"""The staged run: from a config and parameters through a list of stages, resumable at any step."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from babel_jax.config import Config, ModelConfig, Stage
from babel_jax.data.batches.loading import Batches
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.distributed.agreement import agreed
from babel_jax.distributed.stopping import SaveTimes, stop_requests
from babel_jax.files import write_text
from babel_jax.progress import working
from babel_jax.training.compilation import Profile, compiled_by_all
from babel_jax.training.corruption import refuse_without_determinism
from babel_jax.training.deepening import Depth
from babel_jax.training.goodput import Goodput, Spent
from babel_jax.training.hooks import Hook, Moment, Tools, hooks_of
from babel_jax.training.local_checkpoints import LocalCheckpoints, check_replicas, closing
from babel_jax.training.mesh import check_batch, everywhere, global_batch, make_mesh, window_share
from babel_jax.training.metrics import Metrics
from babel_jax.training.optimizer import learning_rate
from babel_jax.training.parts import Parts, check_models
from babel_jax.training.resuming import check_totals, note_text
from babel_jax.training.run_state import Checkpoints, newest_step
from babel_jax.training.setup import Setup, carried_over
from babel_jax.training.stages import PlannedStage, plan_stages, run_order
from babel_jax.training.step import Step, TrainState
from babel_jax.training.watch import Watch

log = logging.getLogger("babel")
StageEnd = Callable[[Stage, ModelConfig, PyTree[Array]], None]


def train_stages(
    config: Config,
    models: Sequence[Depth],
    make_params: Callable[[], PyTree[Array]],
    run_folder: Path,
    on_stage_end: StageEnd,
    watch: Watch | None = None,
    profile: range | None = None,
    hooks: Sequence[Hook] = (),
) -> PyTree[Array]:
    """Trains all stages and returns the parameters after the last.

    `models` is the output of `depths()`. `make_params()` returns the parameters of models[0]. It is called
    when there is no checkpoint, and its arrays are donated. Moments are kept from stage to stage; the rate's
    schedule begins anew. `on_stage_end` is called before anything of the next stage is saved. If a run stops
    during this call, or resumes at the end of a stage, it is called again. `watch` evaluates between steps;
    `profile` names the steps to trace. `hooks` are called after the run's own. If the run stops after a step,
    their `after` is not called for that step.
    Raises BadInput where settings and data do not fit, and when too many updates in a row were skipped.
    """
    # Settings are checked before anything is compiled.
    goodput = Goodput(run_folder / "goodput.json")
    stages = _agreed_stages(config, run_folder)
    check_models(stages, models)
    for plan in stages:
        _log_stage(plan, config)
    if not stages:
        return make_params()
    mesh = _checked_mesh(config)
    languages = run_order(config, stages)
    parts = Parts(config, stages, models, mesh, run_folder, len(languages))
    watch = watch or Watch(run_folder, None, lambda *_: {})
    keep, keep_every = config.training.keep_checkpoints, config.training.keep_every
    folder = run_folder / "checkpoints"
    with (
        Checkpoints(
            folder, parts.model_after, keep, keep_every, lambda: watch.best_step, languages
        ) as checkpoints,
        Profile(run_folder / "tensorboard", profile) as traced,
    ):
        progress = _Progress(*parts.beginning(checkpoints, make_params))
        start, end = progress.start, stages[-1].end
        if jax.process_index() == 0:
            note_text(run_folder / "data.json", open_prepared(config.data.folder).fingerprint, start)
        watch.resume_at(start)
        available = _tokens_by_language(config)
        with Metrics(run_folder, config.data.seq_len, available, start, end, goodput, languages) as metrics:
            tools = Tools(config, checkpoints, metrics, goodput, traced, watch, end)
            loop = Loop(mesh, tools, hooks, {}, languages)
            for number, plan in enumerate(stages):
                # At the end of a stage itself, on_stage_end is called again.
                if start > plan.end:
                    continue
                _train_stage(loop, parts, plan, number, progress)
                with goodput.spent(Spent.EVALUATION):
                    on_stage_end(plan.stage, progress.current.model.config, progress.state.params)
            # The file was saved at the last checkpoint. The evaluation after that checkpoint counts too.
            if start < end and jax.process_index() == 0:
                goodput.save(end - 1)
    return progress.state.params


@dataclasses.dataclass
class _Progress:
    """The progress of a run. It is changed in place: a second reference to an old state would keep its arrays
    on the devices.

    start: the step at which this process began or resumed. current: the setup of the part of the stage that
    is trained now. local: the checkpoints on local disks.
    """

    start: int
    current: Setup
    state: TrainState
    local: LocalCheckpoints | None


def _train_stage(loop: "Loop", parts: Parts, plan: PlannedStage, number: int, progress: _Progress) -> None:
    """Trains the unfinished parts of a stage. Each part has one depth."""
    start, tools = progress.start, loop.tools
    for first, last in parts.of(plan):
        if start >= last:
            continue
        # A deeper model, or other trained layers, need a state of another shape.
        before, progress.current = progress.current, parts.setup(first, plan.stage.train)
        if before is not progress.current:
            progress.state = carried_over(progress.state, before, progress.current, tools.config.optimizer)
        # A deeper model needs more FLOPs for each token, and so does its utilization.
        tools.metrics.of(progress.current.model.config)
        # The first part has the local checkpoints that `Parts.beginning` opened. Each later part opens its
        # own. The part's last step is given as the saved one, so local checkpoints of an earlier try of this
        # part are deleted.
        if first > start:
            progress.local = parts.local_checkpoints(first, last)
        with closing(progress.local):
            steps = range(max(start, first), last)
            progress.state = _train_steps(
                loop, plan, number, steps, progress.current, progress.state, progress.local
            )


class Loop(NamedTuple):
    """The objects that the loops of all stages share.

    hooks: the caller's. programs: the compiled program of each jitted step. languages: in the run's order.
    """

    mesh: Mesh
    tools: Tools
    hooks: Sequence[Hook]
    programs: dict[Step, Step]
    languages: tuple[str, ...]


def _train_steps(
    loop: Loop,
    plan: PlannedStage,
    number: int,
    steps: range,
    current: Setup,
    state: TrainState,
    local: LocalCheckpoints | None,
) -> TrainState:
    """Trains these steps of a stage, counted from the start of the run. The state that it returns is saved.

    Raises BadInput when too many updates in a row were skipped. After Ctrl-C it raises KeyboardInterrupt, and
    after SIGTERM or SIGHUP Preempted, both between two steps. Each leaves a checkpoint.
    """
    tools, mesh = loop.tools, loop.mesh
    config, goodput, training = tools.config, tools.goodput, tools.config.training
    # If one process cannot open the data, all processes end with its message.
    with agreed():
        batches = _batches(config, plan, number, loop).iterate(steps.start - plan.start)
    save_times = SaveTimes(steps.start, training.checkpoint_every, training.checkpoint_minutes)
    # The first step's time does not include what came before it, such as opening the data.
    tools.metrics.restart_clock()
    with stop_requests(lambda: tools.checkpoints.saved) as stopped:
        # The loop: a batch and its rate, the hooks before, the step, the hooks after.
        hooks = [*hooks_of(tools, current, save_times, stopped, local), *loop.hooks]
        for step in steps:
            with goodput.spent(Spent.DATA):
                batch = global_batch(next(batches), mesh)
                rate = learning_rate(plan.stage.schedule, step - plan.start, plan.end - plan.start)
                rate_on_devices = everywhere(np.float32(rate), mesh)
            moment = Moment(step, plan.stage.name, rate, step == steps[-1], state, batch)
            for hook in hooks:
                hook.before(moment)
            train_step = _program(loop, current.step, state, batch, rate_on_devices)
            with _as_step(goodput, step):
                moment.state, moment.values = train_step(state, batch, rate_on_devices)
            # The arrays of the old state were donated to the step. Only the new state may be read.
            state = moment.state
            for hook in hooks:
                hook.after(moment)
    # Save has begun to write the last step in the background. The part ends when that write has ended.
    with goodput.spent(Spent.CHECKPOINT), working("writing the checkpoint"):
        tools.checkpoints.wait()
    return state


@contextlib.contextmanager
def _as_step(goodput: Goodput, step: int) -> Iterator[None]:
    """Counts and traces the block as a step, and forbids implicit transfers to and from the devices."""
    with (
        goodput.spent(Spent.STEP),
        jax.profiler.StepTraceAnnotation("train", step_num=step),
        jax.transfer_guard("disallow"),
    ):
        yield


def _program(loop: Loop, step: Step, *arguments: Any) -> Step:
    """The compiled step. Compiles it the first time."""
    if step not in loop.programs:
        # Compiled apart from the first call, so that this time counts as compilation and not as a step.
        with loop.tools.metrics.aside(Spent.COMPILE), working("compiling the train step"):
            options = loop.tools.config.training.compiler_options
            lowered = cast(jax.stages.Wrapped, step).lower(*arguments)
            loop.programs[step] = cast(Step, compiled_by_all(lowered, options))
    return loop.programs[step]


def _log_stage(plan: PlannedStage, config: Config) -> None:
    """Logs one line for the stage and one for each warning; mixture.txt has the tables."""
    languages = {row.language for row in plan.mixture.rows}
    tokens = f"{plan.tokens:,} tokens of {len(languages)} language{'s' if len(languages) != 1 else ''}"
    log.info("stage %s: steps %d to %d, %s", plan.stage.name, plan.start + 1, plan.end, tokens)
    if plan.asked is not None:
        log.warning(
            "stage %s: its budget is %s tokens, but max_passes = %g allows only %s",
            plan.stage.name, f"{plan.asked:,}", plan.stage.max_passes, f"{plan.tokens:,}",
        )  # fmt: skip
    for warning in plan.mixture.warnings:
        log.warning("stage %s: %s", plan.stage.name, warning)


def _agreed_stages(config: Config, run_folder: Path) -> list[PlannedStage]:
    """The planned stages; writes mixture.json and mixture.txt in the run folder.

    Raises BadInput, in all processes, for a mixture that the prepared data cannot give.
    """
    with agreed():
        stages = plan_stages(config)
        if jax.process_index() == 0:
            # This check reads the mixture.json of the earlier start, so it comes before the new file is
            # written.
            if newest_step(run_folder / "checkpoints"):
                check_totals(stages, run_folder)
            mixtures = {plan.stage.name: plan.mixture.to_json() for plan in stages}
            write_text(run_folder / "mixture.json", json.dumps(mixtures, indent=2) + "\n")
            tables = [f"stage {plan.stage.name}\n{plan.mixture.table()}\n" for plan in stages]
            write_text(run_folder / "mixture.txt", "\n".join(tables))
    return stages


def _checked_mesh(config: Config) -> Mesh:
    """The mesh. Raises BadInput where it does not fit the batch, the windows or the processes."""
    training = config.training
    mesh = make_mesh(training.mesh)
    check_batch(mesh, training.global_batch_size, training.gradient_accumulation, config.data.seq_len)
    # Raises where processes would read windows that overlap in part.
    window_share(mesh)
    if training.local_checkpoints is not None:
        check_replicas(mesh)
    if training.recheck_every is not None:
        refuse_without_determinism(jax.default_backend(), os.environ.get("XLA_FLAGS", ""))
    return mesh


def _batches(config: Config, plan: PlannedStage, number: int, loop: Loop) -> Batches:
    share, shares = window_share(loop.mesh)
    return Batches(
        config.data.folder,
        plan.mixture,
        config.training.global_batch_size,
        config.data.seq_len,
        # Each stage has an order of its own.
        seed=config.seed * 1000 + number,
        share=share,
        shares=shares,
        languages=loop.languages,
    )


def _tokens_by_language(config: Config) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for (language, _), count in open_prepared(config.data.folder).available.items():
        tokens[language] = tokens.get(language, 0) + count
    return tokens
