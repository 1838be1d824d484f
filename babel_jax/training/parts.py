"""The parts of a run: each stage, cut where the model is deepened, with its setup and its first state."""

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from babel_jax.config import Config, ModelConfig, Stage, Trained
from babel_jax.distributed.agreement import agreed
from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.progress import working
from babel_jax.training.deepening import Depth, depth_at
from babel_jax.training.local_checkpoints import LocalCheckpoints
from babel_jax.training.run_state import Checkpoints
from babel_jax.training.setup import Setup, setup_of
from babel_jax.training.stages import PlannedStage
from babel_jax.training.step import TrainState, placed_state

log = logging.getLogger("babel")
OPTIMIZER = "optimizer.txt"
_TRAINED = {
    Trained.ALL: "all",
    Trained.NEW_LAYERS: "the new ones",
    Trained.NEW_ROWS: "the rows of new tokens, none",
}


class Beginning(NamedTuple):
    """The state from which a run begins or resumes: the number of finished steps, the setup and state after
    them, and the local checkpoints of the part (None without).
    """

    start: int
    setup: Setup
    state: TrainState
    local: LocalCheckpoints | None


class Parts:
    """The parts of a run and their setups. Parts of one depth that train the same share a setup, and so the
    compiled step. languages: the number of languages of the run.
    """

    def __init__(
        self,
        config: Config,
        stages: Sequence[PlannedStage],
        models: Sequence[Depth],
        mesh: Mesh,
        run_folder: Path,
        languages: int,
    ):
        self._config, self._stages, self._models = config, stages, models
        self._mesh, self._run_folder, self._languages = mesh, run_folder, languages
        self._setup = functools.cache(self._made)

    def of(self, plan: PlannedStage) -> list[tuple[int, int]]:
        """See `parts_of`."""
        return parts_of(plan, self._models)

    def setup(self, step: int, trained: Trained) -> Setup:
        """The setup at a step of the run."""
        return self._setup(depth_at(self._models, step).start, trained)

    def model_after(self, steps: int) -> ModelConfig:
        """The shape of the model after so many steps."""
        return depth_at(self._models, steps - 1).config

    def local_checkpoints(self, step: int, saved: int) -> LocalCheckpoints | None:
        """The local checkpoints after `saved` steps, of the part with step `step`; None at the end of the
        run, and for a run without.
        """
        if self._config.training.local_checkpoints is None or step >= self._stages[-1].end:
            return None
        # The part of `step` begins at the last start that is not after it.
        starts: list[int] = []
        for plan in self._stages:
            starts += [first for first, _ in self.of(plan)]
        first = max(start for start in starts if start <= step)
        abstract = self.setup(first, self._stage_at(step).train).abstract
        return LocalCheckpoints(self._config, self._run_folder, self._mesh, first, saved, abstract)

    def beginning(self, checkpoints: Checkpoints, make_params: Callable[[], PyTree[Array]]) -> Beginning:
        """The state of the newest checkpoint, here or on the hosts' own disks, or else of `make_params()`."""
        # A checkpoint has the name of its stage, which says what was trained, and so the moments' shapes.
        trained_in = {stage.name: stage.train for stage in self._config.stages}
        with working("reading the checkpoint"):
            restored = checkpoints.restore(
                lambda step, stage: self.setup(step - 1, trained_in[stage]).abstract
            )
        start, end = 0 if restored is None else restored[0], self._stages[-1].end
        local = self.local_checkpoints(start, start)
        if local is not None and local.newest is not None:
            # All later steps of this part have its setup.
            start = local.newest
            restored = None  # frees its memory
            setup = self.setup(start, self._stage_at(start).train)
            log.info("resuming after step %d of %d, from local checkpoints", start, end)
            return Beginning(start, setup, local.restore(), local)
        if restored is None:
            setup = self.setup(0, self._stages[0].stage.train)
            state = placed_state(setup.optimizer, make_params(), setup.shardings, self._languages)
            return Beginning(0, setup, state, local)
        # If the model is deepened at `start`, the checkpoint still has the model of the step before.
        _, stage, state = restored
        log.info("resuming after step %d of %d", start, end)
        return Beginning(start, self.setup(start - 1, trained_in[stage]), state, local)

    def _made(self, start: int, trained: Trained) -> Setup:
        made = setup_of(self._config, self._mesh, depth_at(self._models, start), trained, self._languages)
        layers = made.model.config.num_hidden_layers
        log.info("training %s of %d layers", _TRAINED[trained], layers)
        with agreed():
            if jax.process_index() == 0:
                heading = f"{_TRAINED[trained]} of {layers} layers"
                _note_optimizer(self._run_folder / OPTIMIZER, heading, made)
        return made

    def _stage_at(self, step: int) -> Stage:
        return next(plan.stage for plan in self._stages if plan.start <= step < plan.end)


def parts_of(plan: PlannedStage, models: Sequence[Depth]) -> list[tuple[int, int]]:
    """The steps of a stage, cut where the model is deepened: (first step, step after the
    last) of each part.
    """
    cuts = [plan.start, *(model.start for model in models if plan.start < model.start < plan.end), plan.end]
    return list(itertools.pairwise(cuts))


def check_models(stages: Sequence[PlannedStage], models: Sequence[Depth]) -> None:
    """Raises BadInput where a stage trains layers or rows that its model lacks, and where the model is
    deepened after the last step.
    """
    for plan in stages:
        # A stage of new layers needs some at each of its depths.
        for first, _ in parts_of(plan, models):
            check_trained(plan.stage, depth_at(models, first))
    steps = stages[-1].end if stages else 0
    # A deepening that would never happen is a mistake in the config.
    for model in models[1:]:
        if model.start >= steps:
            raise BadInput(f"deepen: step {model.start} is not before the end; the run has {steps} steps")


def check_trained(stage: Stage, model: Depth) -> None:
    """Raises BadInput where a stage trains layers or rows that its model lacks."""
    begin = f'stage {stage.name}: train = "{stage.train}", and the model has no'
    if stage.train is Trained.NEW_LAYERS and not model.new_layers:
        raise BadInput(f"{begin} new layers; expand it first")
    if stage.train is Trained.NEW_ROWS and not model.new_rows:
        raise BadInput(
            f"{begin} rows of new tokens; add [vocabulary], or begin with the output of `babel tokenizer "
            "extend`"
        )


def _note_optimizer(path: Path, heading: str, made: Setup) -> None:
    """Adds the rate and decay of each parameter to a file, under a heading; warns of idle patterns."""
    # A resumed run has its tables already.
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    table = f"{heading}\n{made.optimizer.table()}\n"
    if table not in before:
        write_text(path, f"{before}{table}\n")
    for warning in made.optimizer.warnings():
        log.warning("optimizer: %s", warning)
