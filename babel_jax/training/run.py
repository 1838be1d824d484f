"""The staged run: from a config and parameters through a list of stages, resumable at any step."""

import contextlib
import json
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from babel_jax.config import Config, ModelConfig, Stage
from babel_jax.data.loading import Batches
from babel_jax.data.mixture import Mixture, make_mixture
from babel_jax.data.prepared import open_prepared
from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.model.decoder import abstract_params
from babel_jax.training.checkpoints import Checkpoints, abstract_state
from babel_jax.training.mesh import global_batch, make_mesh
from babel_jax.training.metrics import Metrics
from babel_jax.training.optimizer import AdamW, learning_rate
from babel_jax.training.step import compiled_step, initial_state, state_shardings

log = logging.getLogger("babel")
StageEnd = Callable[[Stage, PyTree[Array]], None]


class PlannedStage(NamedTuple):
    """A stage with its first step in the run, the step after its last, and its mixture."""

    stage: Stage
    start: int
    end: int
    mixture: Mixture


def plan_stages(config: Config) -> list[PlannedStage]:
    """Budgets in steps and mixtures of all stages. Raises BadInput for a mixture that the prepared data cannot give."""
    available = open_prepared(config.data.folder).available
    tokens_per_step = config.training.global_batch_size * config.data.seq_len
    planned, start = [], 0
    for stage in config.stages:
        steps = stage.steps or max(1, round((stage.tokens or 0) / tokens_per_step))
        planned.append(PlannedStage(stage, start, start + steps, make_mixture(available, stage.mixture, steps * tokens_per_step)))
        start += steps
    return planned


def train_stages(
    config: Config, model_config: ModelConfig, make_params: Callable[[], PyTree[Array]], run_folder: Path, on_stage_end: StageEnd
) -> PyTree[Array]:
    """Trains all stages and gives the parameters after the last.

    `make_params` gives the parameters to begin with, and is called where no checkpoint is found; its arrays are taken over. Moments are
    kept from stage to stage, the schedule begins anew. `on_stage_end` is called before anything of the next stage is saved; a run that was
    stopped in it calls it again. Raises BadInput where settings and data do not fit, and when too many updates in a row were skipped.
    """
    stages = plan_stages(config)
    write_text(run_folder / "mixture.json", json.dumps({plan.stage.name: plan.mixture.to_json() for plan in stages}, indent=2) + "\n")
    for plan in stages:
        log.info("stage %s: steps %d to %d\n%s", plan.stage.name, plan.start, plan.end - 1, plan.mixture.table())

    mesh = make_mesh(config.training.mesh)
    optimizer = AdamW(config.optimizer, abstract_params(model_config))
    shardings = state_shardings(model_config, optimizer, mesh)
    abstract = abstract_state(jax.eval_shape(lambda params: initial_state(optimizer, params), abstract_params(model_config)), shardings)
    step = compiled_step(model_config, optimizer, config.optimizer, config.training, mesh)

    with Checkpoints(run_folder / "checkpoints", config.training.keep_checkpoints) as checkpoints, interrupts() as interrupted:
        restored = checkpoints.restore(abstract)
        if restored is None:
            start, state = 0, jax.device_put(initial_state(optimizer, make_params()), shardings)
        else:
            start, state = restored
            log.info("resuming at step %d of %d", start, stages[-1].end)
        metrics = Metrics(run_folder, model_config, config.data.seq_len, _tokens_by_language(config), start, stages[-1].end)
        try:
            for number, plan in enumerate(stages):
                if start > plan.end:
                    continue
                batches = _batches(config, plan, number).iterate(max(start, plan.start) - plan.start) if start < plan.end else iter(())
                for now, batch in zip(range(max(start, plan.start), plan.end), batches, strict=False):
                    rate = learning_rate(plan.stage.schedule, now - plan.start, plan.end - plan.start)
                    state, values = step(state, global_batch(batch, mesh), jnp.float32(rate))
                    skipped = metrics.log(now, plan.stage.name, rate, config.training.global_batch_size * config.data.seq_len, values)
                    if skipped >= config.training.max_skipped_steps:
                        checkpoints.save(now + 1, state)
                        raise BadInput(
                            f"{run_folder}: loss or gradient was not finite for {skipped} steps in a row, up to step {now - 1}; lower the "
                            "peak rate of the stage or look at its data. Parameters as before those steps are in the last checkpoint"
                        )
                    if interrupted():
                        checkpoints.save(now + 1, state)
                        raise KeyboardInterrupt
                    if (now + 1) % config.training.checkpoint_every == 0:
                        checkpoints.save(now + 1, state)
                metrics.flush()
                checkpoints.save(plan.end, state)
                checkpoints.wait()
                on_stage_end(plan.stage, state["params"])
        finally:
            metrics.close()
    return state["params"]


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C back and gives a function that says whether it was pressed, to stop between steps. A second one stops at once."""
    pressed: list[int] = []

    def note(number: int, _: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: signals do not come here
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _batches(config: Config, plan: PlannedStage, number: int) -> Batches:
    return Batches(
        config.data.folder,
        plan.mixture,
        config.training.global_batch_size,
        config.data.seq_len,
        seed=config.seed * 1000 + number,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _tokens_by_language(config: Config) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for (language, _), count in open_prepared(config.data.folder).available.items():
        tokens[language] = tokens.get(language, 0) + count
    return tokens
