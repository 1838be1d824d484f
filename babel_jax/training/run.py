"""The staged run: from a config and parameters through a list of stages, resumable at any step."""

import contextlib
import functools
import itertools
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

from babel_jax.config import Config, ModelConfig, Stage, Trained
from babel_jax.data.batches.loading import Batches
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.distributed.agreement import agreed, meet
from babel_jax.distributed.stopping import SaveTimes, stop_requests
from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.progress import working
from babel_jax.training.compilation import Profile
from babel_jax.training.corruption import refuse_without_determinism
from babel_jax.training.deepening import Depth, depth_at
from babel_jax.training.goodput import Goodput, Spent
from babel_jax.training.hooks import Hook, Moment, Tools, hooks_of
from babel_jax.training.local_checkpoints import LocalCheckpoints, check_replicas, closing
from babel_jax.training.mesh import check_batch, everywhere, global_batch, make_mesh, window_share
from babel_jax.training.metrics import Metrics
from babel_jax.training.optimizer import learning_rate
from babel_jax.training.resuming import check_totals, note_text
from babel_jax.training.run_state import Checkpoints, newest_step
from babel_jax.training.setup import Setup, carried_over, setup_of
from babel_jax.training.stages import PlannedStage, plan_stages, run_order
from babel_jax.training.step import Step, TrainState, placed_state
from babel_jax.training.watch import Watch

log = logging.getLogger("babel")
OPTIMIZER = "optimizer.txt"
_TRAINED = {
    Trained.ALL: "all",
    Trained.NEW_LAYERS: "the new ones",
    Trained.NEW_ROWS: "the rows of new tokens, none",
}
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
    schedule begins anew. `on_stage_end` is called before anything of the next stage is saved. A run that was
    stopped in it, or that resumes at the end of a stage, calls it again. `watch` evaluates between steps;
    `profile` names the steps to trace. `hooks` are called after the run's own; on a step after which the run
    stops, their `after` is not called.
    Raises BadInput where settings and data do not fit, and when too many updates in a row were skipped.
    """
    # All that can be wrong in the settings is told before anything is compiled.
    goodput = Goodput(run_folder / "goodput.json")
    stages = _agreed_stages(config, run_folder)
    _check_models(stages, models)
    for plan in stages:
        _tell(plan, config)
    if not stages:
        return make_params()
    mesh = _checked_mesh(config)
    languages = run_order(config, stages)

    @functools.cache
    def setup(start: int, trained: Trained) -> Setup:
        made = setup_of(config, mesh, depth_at(models, start), trained, len(languages))
        layers = made.model.config.num_hidden_layers
        log.info("training %s of %d layers", _TRAINED[trained], layers)
        with agreed():
            if jax.process_index() == 0:
                _note_optimizer(run_folder / OPTIMIZER, f"{_TRAINED[trained]} of {layers} layers", made)
        return made

    def setup_at(step: int, trained: Trained) -> Setup:
        return setup(depth_at(models, step).start, trained)

    def model_after(steps: int) -> ModelConfig:
        return depth_at(models, steps - 1).config

    def local_in(step: int, saved: int) -> LocalCheckpoints | None:
        """The local checkpoints after `saved` steps, of the part with step `step`; None at the end."""
        if config.training.local_checkpoints is None or step >= stages[-1].end:
            return None
        starts = [first for plan in stages for first, _ in _parts(plan, models)]
        first = max(start for start in starts if start <= step)
        abstract = setup_at(first, _stage_at(stages, step).train).abstract
        return LocalCheckpoints(config, run_folder, mesh, first, saved, abstract)

    # A checkpoint has the name of its stage, which says what was trained, and so the moments' shapes.
    trained_in = {stage.name: stage.train for stage in config.stages}
    watch = watch or Watch(run_folder, None, lambda *_: {})
    keep, keep_every = config.training.keep_checkpoints, config.training.keep_every
    with (
        Checkpoints(
            run_folder / "checkpoints", model_after, keep, keep_every, lambda: watch.best_step, languages
        ) as checkpoints,
        Profile(run_folder / "tensorboard", profile) as traced,
    ):
        # From the newest checkpoint, or from the beginning.
        with working("reading the checkpoint"):
            restored = checkpoints.restore(lambda step, stage: setup_at(step - 1, trained_in[stage]).abstract)
        start = 0 if restored is None else restored[0]
        local = local_in(start, start)
        if local is not None and local.newest is not None:
            # All later steps of this part have its setup.
            start, current = local.newest, setup_at(start, _stage_at(stages, start).train)
            restored = None  # frees its memory
            state = local.restore()
            log.info("resuming after step %d of %d, from local checkpoints", start, stages[-1].end)
        elif restored is None:
            current = setup_at(0, stages[0].stage.train)
            state = placed_state(current.optimizer, make_params(), current.shardings, len(languages))
        else:
            _, stage, state = restored
            current = setup_at(start - 1, trained_in[stage])
            log.info("resuming after step %d of %d", start, stages[-1].end)
        if jax.process_index() == 0:
            note_text(run_folder / "data.json", open_prepared(config.data.folder).fingerprint, start)
        watch.resume_at(start)

        # Stage by stage, and within a stage depth by depth.
        end, seq_len = stages[-1].end, config.data.seq_len
        available = _tokens_by_language(config)
        with Metrics(run_folder, seq_len, available, start, end, goodput, languages) as metrics:
            tools = Tools(config, checkpoints, metrics, goodput, traced, watch, end)
            loop = Loop(mesh, tools, hooks, {}, languages)
            for number, plan in enumerate(stages):
                # A run that was stopped in on_stage_end resumes at the end of that stage, and calls it again.
                if start > plan.end:
                    continue
                for first, last in _parts(plan, models):
                    if start >= last:
                        continue
                    # The state changes its shape where the model is deepened, or where other layers are
                    # trained.
                    before, current = current, setup_at(first, plan.stage.train)
                    if before is not current:
                        state = carried_over(state, before, current, config.optimizer)
                    metrics.of(current.model.config)
                    if first > start:
                        local = local_in(first, last)
                    with closing(local):
                        steps = range(max(start, first), last)
                        state = _train_steps(loop, plan, number, steps, current, state, local)
                with goodput.spent(Spent.EVALUATION):
                    on_stage_end(plan.stage, current.model.config, state.params)
            if start < end and jax.process_index() == 0:
                goodput.save(end - 1)
    return state.params


class Loop(NamedTuple):
    """What the loops of all stages share.

    `hooks` are those beside the run's own, `programs` compiled steps, `languages` the order of the run.
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
    """Takes `steps` (numbers in the run) of a stage. Returns the state, already written to disk.

    Raises BadInput when too many updates in a row were skipped, and between two steps KeyboardInterrupt after
    Ctrl-C and Preempted after SIGTERM or SIGHUP; all leave a checkpoint.
    """
    tools, mesh = loop.tools, loop.mesh
    config, goodput, training = tools.config, tools.goodput, tools.config.training
    with agreed():
        batches = _batches(config, plan, number, loop).iterate(steps.start - plan.start)
    save_times = SaveTimes(steps.start, training.checkpoint_every, training.checkpoint_minutes)
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
            state = moment.state
            for hook in hooks:
                hook.after(moment)
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
    """Compiles the step in all processes before any runs it. Else devices would wait in a collective
    operation for a host that still compiles.
    """
    if step not in loop.programs:
        with loop.tools.metrics.aside(Spent.COMPILE), working("compiling the train step"):
            loop.programs[step] = cast(jax.stages.Wrapped, step).lower(*arguments).compile()
            meet()
    return loop.programs[step]


def _tell(plan: PlannedStage, config: Config) -> None:
    """Logs a stage in one line, and one for each warning. The tables are in files."""
    languages = {row.language for row in plan.mixture.rows}
    tokens = f"{plan.tokens:,} tokens of {len(languages)} language{'s' if len(languages) != 1 else ''}"
    log.info("stage %s: steps %d to %d, %s", plan.stage.name, plan.start + 1, plan.end, tokens)
    if plan.asked is not None:
        log.warning(
            "stage %s: max_passes = %g allows %s tokens of the %s that its budget asks for",
            plan.stage.name, plan.stage.max_passes, f"{plan.tokens:,}", f"{plan.asked:,}",
        )  # fmt: skip
    for warning in plan.mixture.warnings:
        log.warning("stage %s: %s", plan.stage.name, warning)


def _note_optimizer(path: Path, heading: str, made: Setup) -> None:
    """Adds the rate and decay of each parameter to a file, under a heading; warns of idle patterns."""
    # A resumed run has its tables already.
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    table = f"{heading}\n{made.optimizer.table()}\n"
    if table not in before:
        write_text(path, f"{before}{table}\n")
    for warning in made.optimizer.warnings():
        log.warning("optimizer: %s", warning)


def _agreed_stages(config: Config, run_folder: Path) -> list[PlannedStage]:
    """The planned stages; writes mixture.json and mixture.txt in the run folder.

    Raises BadInput, in all processes, for a mixture that the prepared data cannot give.
    """
    with agreed():
        stages = plan_stages(config)
        if jax.process_index() == 0:
            if newest_step(run_folder / "checkpoints"):
                check_totals(stages, run_folder)
            mixtures = {plan.stage.name: plan.mixture.to_json() for plan in stages}
            write_text(run_folder / "mixture.json", json.dumps(mixtures, indent=2) + "\n")
            tables = [f"stage {plan.stage.name}\n{plan.mixture.table()}\n" for plan in stages]
            write_text(run_folder / "mixture.txt", "\n".join(tables))
    return stages


def _check_models(stages: Sequence[PlannedStage], models: Sequence[Depth]) -> None:
    for plan in stages:
        # A stage of new layers needs some at each of its depths.
        without = [first for first, _ in _parts(plan, models) if not depth_at(models, first).new_layers]
        if plan.stage.train is Trained.NEW_LAYERS and without:
            raise BadInput(
                f'stage {plan.stage.name}: train = "{plan.stage.train}", and the model has no new layers; '
                "expand it first"
            )
        if plan.stage.train is Trained.NEW_ROWS and not models[0].new_rows:
            raise BadInput(
                f'stage {plan.stage.name}: train = "{plan.stage.train}", and the model has no rows of new '
                "tokens; add [vocabulary], or begin with the output of `babel tokenizer extend`"
            )
    steps = stages[-1].end if stages else 0
    for model in models[1:]:
        if model.start >= steps:
            raise BadInput(f"deepen: step {model.start} is not before the end; the run has {steps} steps")


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


def _stage_at(stages: Sequence[PlannedStage], step: int) -> Stage:
    return next(plan.stage for plan in stages if plan.start <= step < plan.end)


def _parts(plan: PlannedStage, models: Sequence[Depth]) -> list[tuple[int, int]]:
    """The steps of a stage, cut where the model is deepened: (first step, step after the
    last) of each part.
    """
    cuts = [plan.start, *(model.start for model in models if plan.start < model.start < plan.end), plan.end]
    return list(itertools.pairwise(cuts))


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
