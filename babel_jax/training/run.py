"""The staged run: from a config and parameters through a list of stages, resumable at any step."""

import functools
import itertools
import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from babel_jax.config import Config, ModelConfig, OptimizerSettings, Stage, Trained, TrainingSettings
from babel_jax.data.batches.loading import Batches
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.distributed.agreement import agreed, meet
from babel_jax.distributed.stopping import SaveTimes, stop_requests
from babel_jax.errors import BadInput, Preempted
from babel_jax.files import write_text
from babel_jax.model.decoder import abstract_params
from babel_jax.run_files import Mixture as MixtureFile
from babel_jax.run_files import TextRead, read_as
from babel_jax.training.compilation import Profile
from babel_jax.training.corruption import BitChecks, refuse_without_determinism
from babel_jax.training.deepening import Depth, depth_at, expand_state
from babel_jax.training.goodput import Goodput, Spent
from babel_jax.training.mesh import check_batch, everywhere, global_batch, make_mesh, window_share
from babel_jax.training.metrics import Metrics
from babel_jax.training.optimizer import AdamW, learning_rate
from babel_jax.training.run_state import Checkpoints, abstract_state, newest_step
from babel_jax.training.stages import PlannedStage, plan_stages
from babel_jax.training.step import (
    Step,
    TrainState,
    compiled_step,
    initial_state,
    placed_state,
    state_shardings,
)
from babel_jax.training.watch import Watch

log = logging.getLogger("babel")
StageEnd = Callable[[Stage, ModelConfig, PyTree[Array]], None]


class Setup(NamedTuple):
    """What a step needs, for one model and one choice of what is trained; `abstract` is the state as shapes,
    types and shardings.
    """

    model: Depth
    trained: Trained
    optimizer: AdamW
    shardings: TrainState
    abstract: TrainState
    step: Step
    bit_checks: BitChecks


def setup_of(config: Config, mesh: Mesh, model: Depth, trained: Trained) -> Setup:
    """The setup of one model and one choice of what is trained."""
    params = abstract_params(model.config)
    optimizer = AdamW(config.optimizer, params, trained, model.new_layers)
    shardings = state_shardings(model.config, optimizer, mesh, config.training.offload_optimizer_state)
    abstract = abstract_state(
        jax.eval_shape(lambda params: initial_state(optimizer, params), params), shardings
    )
    step = compiled_step(model.config, optimizer, config.optimizer, config.training, mesh)
    bit_checks = BitChecks(model.config, config.optimizer, config.training, mesh)
    return Setup(model, trained, optimizer, shardings, abstract, step, bit_checks)


def train_stages(
    config: Config,
    models: Sequence[Depth],
    make_params: Callable[[], PyTree[Array]],
    run_folder: Path,
    on_stage_end: StageEnd,
    watch: Watch | None = None,
    profile: range | None = None,
) -> PyTree[Array]:
    """Trains all stages and gives the parameters after the last.

    `models` are those of `depths`, the first of which `make_params` gives the parameters of; it is called
    where no checkpoint is found, and its arrays are taken over. Moments are kept from stage to stage, the
    schedule begins anew. `on_stage_end` is called before anything of the next stage is saved; a run that was
    stopped in it calls it again. `watch` measures between steps, and `profile` says which steps to trace.
    Raises BadInput where settings and data do not fit, and when too many updates in a row were skipped.
    """
    goodput = Goodput(run_folder / "goodput.json")
    with agreed():
        stages = plan_stages(config)
        if jax.process_index() == 0:
            if newest_step(run_folder / "checkpoints"):
                _check_totals(stages, run_folder)
            mixtures = {plan.stage.name: plan.mixture.to_json() for plan in stages}
            write_text(run_folder / "mixture.json", json.dumps(mixtures, indent=2) + "\n")
    _check_models(stages, models)
    for plan in stages:
        log.info(
            "stage %s: steps %d to %d\n%s", plan.stage.name, plan.start, plan.end - 1, plan.mixture.table()
        )

    if not stages:
        return make_params()
    mesh = make_mesh(config.training.mesh)
    check_batch(
        mesh, config.training.global_batch_size, config.training.gradient_accumulation, config.data.seq_len
    )
    window_share(mesh)  # refused before anything is made
    if config.training.recheck_every is not None:
        refuse_without_determinism(jax.default_backend(), os.environ.get("XLA_FLAGS", ""))

    @functools.cache
    def setup(step: int, trained: Trained) -> Setup:
        made = setup_of(config, mesh, depth_at(models, step), trained)
        layers = made.model.config.num_hidden_layers
        log.info("optimizer, training %s of %d layers\n%s", trained, layers, made.optimizer.table())
        return made

    def setup_at(step: int, trained: Trained) -> Setup:
        return setup(depth_at(models, step).start, trained)

    def model_after(steps: int) -> ModelConfig:
        return depth_at(models, steps - 1).config

    trained_in = {stage.name: stage.train for stage in config.stages}
    watch = watch or Watch(run_folder, None, lambda *_: {})
    training = config.training
    with (
        Checkpoints(
            run_folder / "checkpoints",
            model_after,
            training.keep_checkpoints,
            training.keep_every,
            lambda: watch.best_step,
        ) as checkpoints,
        Profile(run_folder / "tensorboard", profile) as traced,
    ):
        restored = checkpoints.restore(lambda step, stage: setup_at(step - 1, trained_in[stage]).abstract)
        if restored is None:
            start, current = 0, setup_at(0, stages[0].stage.train)
            state = placed_state(current.optimizer, make_params(), current.shardings)
        else:
            start, stage, state = restored
            current = setup_at(start - 1, trained_in[stage])
            log.info("resuming at step %d of %d", start, stages[-1].end)
        if jax.process_index() == 0:
            _note_text(run_folder / "data.json", open_prepared(config.data.folder).fingerprint, start)
        watch.resume_at(start)
        available = _tokens_by_language(config)
        with Metrics(run_folder, config.data.seq_len, available, start, stages[-1].end, goodput) as metrics:
            loop = Loop(config, mesh, checkpoints, metrics, goodput, traced, watch, {})
            for number, plan in enumerate(stages):
                # A run that stands right at the end of a stage may have been stopped in on_stage_end, so that
                # is called again.
                if start > plan.end:
                    continue
                for first, last in _parts(plan, models):
                    if start >= last:
                        continue
                    before, current = current, setup_at(first, plan.stage.train)
                    if before is not current:
                        state = _carried_over(state, before, current, config.optimizer)
                    metrics.of(current.model.config)
                    state = _train_stage(loop, plan, number, range(max(start, first), last), current, state)
                with goodput.spent(Spent.EVALUATION):
                    on_stage_end(plan.stage, current.model.config, state["params"])
            if start < stages[-1].end and jax.process_index() == 0:
                goodput.save(stages[-1].end - 1)
    return state["params"]


def _check_models(stages: Sequence[PlannedStage], models: Sequence[Depth]) -> None:
    for plan in stages:
        if plan.stage.train is Trained.NEW_LAYERS and any(
            not depth_at(models, first).new_layers for first, _ in _parts(plan, models)
        ):
            raise BadInput(
                f'stage {plan.stage.name}: train = "{plan.stage.train}", and the model has no new layers; '
                "expand it first"
            )
    steps = stages[-1].end if stages else 0
    for model in models[1:]:
        if model.start >= steps:
            raise BadInput(f"deepen: there is no step {model.start}; the run has the steps 0 to {steps - 1}")


def _note_text(path: Path, fingerprint: str, step: int) -> None:
    """Keeps which prepared text the steps from one on have read.

    Says so where a run goes on with other text than it was begun with.
    """
    before = read_as(path, TextRead)["text"] if step and path.is_file() else []
    known = [entry for entry in before if entry["from_step"] < step]
    if known and known[-1]["fingerprint"] != fingerprint:
        log.warning(
            "the text was prepared anew, from other text or with other settings, since step %d: the steps "
            "from %d on read other windows, "
            "and the result is not that of a run without a stop (%s keeps it)",
            known[-1]["from_step"],
            step,
            path,
        )
    if not known or known[-1]["fingerprint"] != fingerprint:
        known.append({"from_step": step, "fingerprint": fingerprint})
    write_text(path, json.dumps({"text": known}, indent=2) + "\n")


def _check_totals(stages: Sequence[PlannedStage], run_folder: Path) -> None:
    """Raises BadInput for a run that an earlier version began, in which `curated` came on top of a language's
    own part.
    """
    path = run_folder / "mixture.json"
    before = read_as(path, dict[str, MixtureFile]) if path.is_file() else {}
    for plan in stages:
        rows = before.get(plan.stage.name, {}).get("rows", [])
        for code in plan.stage.mixture.curated if rows else ():
            had = sum(row["share"] for row in rows if row["language"] == code)
            has = plan.mixture.languages.get(code, 0.0)
            if abs(had - has) > 1e-6:
                raise BadInput(
                    f"{run_folder}: stage {plan.stage.name} was begun with {had:.1%} {code}, and curated = "
                    f"{{ {code} = "
                    f"{plan.stage.mixture.curated[code]:g} }} now gives {has:.1%}: earlier versions added "
                    "it to the language's own part; "
                    f"write curated_extra for curated in the config and in {run_folder / 'config.toml'}, or "
                    "give another out"
                )


def _parts(plan: PlannedStage, models: Sequence[Depth]) -> list[tuple[int, int]]:
    """The steps of a stage, cut where the model is deepened: pairs of the first step and the one after the
    last.
    """
    cuts = [plan.start, *(model.start for model in models if plan.start < model.start < plan.end), plan.end]
    return list(itertools.pairwise(cuts))


def _carried_over(state: TrainState, before: Setup, after: Setup, settings: OptimizerSettings) -> TrainState:
    """The state of a deeper model, or with the moments of another choice of what is trained."""
    params, opt_state = carrying_over(before, after, settings)(state["params"], state["opt_state"])
    return {**state, "params": params, "opt_state": opt_state}


def carrying_over(before: Setup, after: Setup, settings: OptimizerSettings) -> Any:
    """The program of `_carried_over`: of parameters and moments."""

    def carry_over(params: PyTree[Array], opt_state: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        opt_state = jax.device_put(opt_state, jax.memory.Space.Device)  # where they are offloaded
        if before.model is after.model:
            return params, after.optimizer.carried_over(opt_state, before.optimizer, params)
        # Every layer has moments of its own only where all are trained.
        whole, deeper = (AdamW(settings, abstract_params(setup.model.config)) for setup in (before, after))
        params, opt_state = expand_state(
            params, whole.carried_over(opt_state, before.optimizer, params), after.model
        )
        return params, after.optimizer.carried_over(opt_state, deeper, params)

    return jax.jit(carry_over, out_shardings=(after.shardings["params"], after.shardings["opt_state"]))


class Loop(NamedTuple):
    """What the loops of all stages share; `programs` are the steps compiled."""

    config: Config
    mesh: Mesh
    checkpoints: Checkpoints
    metrics: Metrics
    goodput: Goodput
    traced: Profile
    watch: Watch
    programs: dict[Step, Step]


def _program(loop: Loop, step: Step, *arguments: Any) -> Step:
    """The step compiled, on all processes: no device waits in a collective operation for a host that
    compiles.
    """
    if step not in loop.programs:
        with loop.goodput.spent(Spent.COMPILE):
            loop.programs[step] = cast(jax.stages.Wrapped, step).lower(*arguments).compile()
            meet()
        loop.metrics.restart_clock()
    return loop.programs[step]


def _train_stage(
    loop: Loop, plan: PlannedStage, number: int, steps: range, current: Setup, state: TrainState
) -> TrainState:
    """The state after these steps of the stage (counted over the run), on disk when this returns.

    Raises BadInput when too many updates in a row were skipped, and between two steps KeyboardInterrupt after
    Ctrl-C and Preempted after SIGTERM or SIGHUP; all leave a checkpoint.
    """
    config, mesh, checkpoints, metrics, goodput, traced, watch, _ = loop
    training = config.training
    with agreed():
        batches = _batches(config, plan, number, mesh).iterate(steps.start - plan.start)
    save_times = SaveTimes(steps.start, training.checkpoint_every, training.checkpoint_minutes)
    metrics.restart_clock()
    with stop_requests() as stopped:
        for now in steps:
            rate = learning_rate(plan.stage.schedule, now - plan.start, plan.end - plan.start)
            with goodput.spent(Spent.DATA):
                inputs = global_batch(next(batches), mesh), everywhere(np.float32(rate), mesh)
            if training.recheck_every is not None and (now + 1) % training.recheck_every == 0:
                with goodput.spent(Spent.STEP):
                    current.bit_checks.check_gradients(now, state["params"], inputs[0])
                metrics.restart_clock()
            traced.before(now)
            program = _program(loop, current.step, state, *inputs)
            with (
                goodput.spent(Spent.STEP),
                jax.profiler.StepTraceAnnotation("train", step_num=now),
                jax.transfer_guard("disallow"),
            ):
                state, values = program(state, *inputs)
            traced.after(now, values)
            checkpoints.check()
            with goodput.spent(Spent.STEP):
                skipped = metrics.log(now, plan.stage.name, rate, values)
                signalled = stopped(now + 1)
                if watch.due(now + 1):
                    skipped = metrics.flush()
            if watch.due(now + 1):
                with goodput.spent(Spent.EVALUATION):
                    metrics.log_evaluation(
                        now + 1, watch.measured(now + 1, current.model.config, state["params"])
                    )
                metrics.restart_clock()
            # Saved are: the best so far, every so many steps or minutes, the end of a stage and of a depth,
            # and where the run stops before its time.
            last = signalled or now + 1 == steps.stop or skipped >= training.max_skipped_steps
            if save_times.due(now + 1) or last or watch.best_step == now + 1:
                with goodput.spent(Spent.STEP):
                    skipped = metrics.sync()
                with goodput.spent(Spent.CHECKPOINT):
                    current.bit_checks.check_replicas(now + 1, state["params"])
                    checkpoints.save(now + 1, state, plan.stage.name)
                metrics.restart_clock()
            if skipped >= training.max_skipped_steps:
                raise BadInput(
                    f"stage {plan.stage.name}: loss or gradient was not finite{_or_a_spike(training)} for "
                    f"{skipped} steps in a row, up to "
                    f"step {now}; lower the peak rate or look at the data; "
                    f"{config.out}/checkpoints/{now + 1} has the parameters of before"
                )
            if signalled:
                # Waited for here, where a second Ctrl-C is held back.
                with goodput.spent(Spent.CHECKPOINT):
                    checkpoints.wait()
                if signalled is signal.SIGINT:
                    raise KeyboardInterrupt
                raise Preempted(f"stopped by {signalled.name} after step {now}, with a checkpoint")
    with goodput.spent(Spent.CHECKPOINT):
        checkpoints.wait()
    return state


def _or_a_spike(training: TrainingSettings) -> str:
    return (
        ""
        if training.skip_spikes is None
        else f", or more than {training.skip_spikes:g} deviations above those before,"
    )


def _batches(config: Config, plan: PlannedStage, number: int, mesh: Mesh) -> Batches:
    share, shares = window_share(mesh)
    return Batches(
        config.data.folder,
        plan.mixture,
        config.training.global_batch_size,
        config.data.seq_len,
        seed=config.seed * 1000 + number,
        share=share,
        shares=shares,
    )


def _tokens_by_language(config: Config) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for (language, _), count in open_prepared(config.data.folder).available.items():
        tokens[language] = tokens.get(language, 0) + count
    return tokens
