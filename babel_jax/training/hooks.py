"""What a run does around each train step. One hook is one concern. Long work (evaluation, checkpoints) is
counted apart from the steps; logging and listening count as steps.

The loop in `run` calls `before` of all hooks in order, then the step, then `after` of all hooks in order.
"""

import dataclasses
from signal import SIGINT, Signals

from jaxtyping import Array

from babel_jax.config import Config, TrainingSettings
from babel_jax.distributed.stopping import SaveTimes, Stopped
from babel_jax.errors import BadInput, Preempted
from babel_jax.progress import working
from babel_jax.training.compilation import Profile
from babel_jax.training.corruption import BitChecks
from babel_jax.training.goodput import Goodput, Spent
from babel_jax.training.local_checkpoints import LocalCheckpoints
from babel_jax.training.metrics import Metrics
from babel_jax.training.run_state import Checkpoints
from babel_jax.training.setup import Setup
from babel_jax.training.step import TrainState
from babel_jax.training.watch import Watch


@dataclasses.dataclass
class Moment:
    """One step, as the hooks see it. `number` counts the steps of the run from 0.

    `state` is the state before the step, and after it the new one. `values` are the metrics of the step, as
    arrays on the devices: Metrics reads them during the next step. `is_last`: the last step of its stage, or
    of this depth of the model. Hooks write down what later ones need: `skipped`, the updates skipped in a row
    up to the last written step, and the `signal` that asks the run to stop.
    """

    number: int
    stage: str
    rate: float
    is_last: bool
    state: TrainState
    batch: dict[str, Array]
    values: dict[str, Array] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    signal: Signals | None = None

    @property
    def taken(self) -> int:
        """How many steps the run has taken once this one is done."""
        return self.number + 1


class Hook:
    """Something that is done before or after a step. The methods of this class do nothing."""

    def before(self, moment: Moment) -> None:
        """Called when the batch is on the devices, before the step."""

    def after(self, moment: Moment) -> None:
        """Called when the step is dispatched.

        The devices may still compute it: to read a value waits for it.
        """


@dataclasses.dataclass
class Tools:
    """The objects that the hooks of all stages share."""

    config: Config
    checkpoints: Checkpoints
    metrics: Metrics
    goodput: Goodput
    profile: Profile
    watch: Watch
    steps: int  # of the whole run


def hooks_of(
    tools: Tools, setup: Setup, save_times: SaveTimes, stopped: Stopped, local: LocalCheckpoints | None
) -> list[Hook]:
    """The hooks of a run, in their order: Log sets `skipped` and Listen sets `signal`, which Save and the two
    hooks that stop the run read. Save comes before the stops.
    """
    training = tools.config.training
    return [
        Recheck(training, setup.bit_checks, tools.metrics),
        Trace(tools.profile),
        # After the step. A failed write is told before more work is lost.
        NoticeFailedWrite(tools.checkpoints),
        Log(tools.metrics, tools.goodput),
        Listen(stopped, tools.goodput),
        # Evaluation comes before Save, because the best step so far is saved.
        Evaluate(tools.watch, tools.metrics, tools.goodput, setup),
        Save(tools, setup.bit_checks, save_times),
        SaveLocally(tools, setup.bit_checks, local),
        StopAfterSkipping(tools.config),
        StopOnRequest(tools.checkpoints, tools.goodput, tools.steps),
    ]


@dataclasses.dataclass
class Recheck(Hook):
    """Every `training.recheck_every` steps, computes the gradients twice and compares them bit by bit."""

    training: TrainingSettings
    checks: BitChecks
    metrics: Metrics

    def before(self, moment: Moment) -> None:
        every = self.training.recheck_every
        if every is not None and moment.taken % every == 0:
            with self.metrics.aside(Spent.STEP):
                self.checks.check_gradients(moment.number, moment.state.params, moment.batch)


@dataclasses.dataclass
class Trace(Hook):
    """Traces the steps that `--profile` names."""

    profile: Profile

    def before(self, moment: Moment) -> None:
        self.profile.before(moment.number)

    def after(self, moment: Moment) -> None:
        self.profile.after(moment.number, moment.values)


@dataclasses.dataclass
class NoticeFailedWrite(Hook):
    """Raises the error of the last checkpoint, if its write failed since the last step."""

    checkpoints: Checkpoints

    def after(self, moment: Moment) -> None:
        self.checkpoints.check()


@dataclasses.dataclass
class Log(Hook):
    """Gives the metrics of this step to `Metrics`, which writes the metrics of the step before."""

    metrics: Metrics
    goodput: Goodput

    def after(self, moment: Moment) -> None:
        with self.goodput.spent(Spent.STEP):
            moment.skipped = self.metrics.log(moment.number, moment.stage, moment.rate, moment.values)


@dataclasses.dataclass
class Listen(Hook):
    """Notes whether Ctrl-C, SIGTERM or SIGHUP came: after the same step in all processes."""

    stopped: Stopped
    goodput: Goodput

    def after(self, moment: Moment) -> None:
        with self.goodput.spent(Spent.STEP):
            moment.signal = self.stopped(moment.taken)


@dataclasses.dataclass
class Evaluate(Hook):
    """Every `evaluation.every` steps, evaluates the model."""

    watch: Watch
    metrics: Metrics
    goodput: Goodput
    setup: Setup

    def after(self, moment: Moment) -> None:
        if not self.watch.due(moment.taken):
            return
        # The line of this step is written first, so that its time has no evaluation in it.
        with self.goodput.spent(Spent.STEP):
            moment.skipped = self.metrics.flush()
        with self.metrics.aside(Spent.EVALUATION):
            results = self.watch.evaluate(moment.taken, self.setup.model.config, moment.state.params)
            self.metrics.log_evaluation(moment.taken, results)


@dataclasses.dataclass
class Save(Hook):
    """Saves a checkpoint: when one is due, at the end of a stage or depth, when the run stops early, and when
    the bits per byte are the lowest so far.
    """

    tools: Tools
    checks: BitChecks
    save_times: SaveTimes

    def after(self, moment: Moment) -> None:
        most = self.tools.config.training.max_skipped_steps
        stops = moment.is_last or moment.signal is not None or moment.skipped >= most
        is_best = self.tools.watch.best_step == moment.taken
        # `due` may communicate, so every process calls it after every step.
        is_due = self.save_times.due(moment.taken)
        # Steps without a checkpoint wait for nothing.
        if not (is_due or stops or is_best):
            return
        # First the metrics, then the checkpoint: a run that resumes here needs the lines of all steps before.
        with self.tools.goodput.spent(Spent.STEP):
            moment.skipped = self.tools.metrics.sync()
        with self.tools.metrics.aside(Spent.CHECKPOINT):
            # Corrupted parameters must be found before a checkpoint has them.
            self.checks.check_replicas(moment.taken, moment.state.params)
            self.tools.checkpoints.save(moment.taken, moment.state, moment.stage)


@dataclasses.dataclass
class SaveLocally(Hook):
    """Every `training.local_checkpoint_every` steps, saves a checkpoint on the hosts' own disks. Not after a
    step that the run folder has or is about to get.
    """

    tools: Tools
    checks: BitChecks
    local: LocalCheckpoints | None

    def after(self, moment: Moment) -> None:
        every = self.tools.config.training.local_checkpoint_every
        if self.local is None or moment.taken % every or self.tools.checkpoints.newest() == moment.taken:
            return
        with self.tools.goodput.spent(Spent.STEP):
            self.tools.metrics.sync()
        with self.tools.metrics.aside(Spent.CHECKPOINT):
            self.checks.check_replicas(moment.taken, moment.state.params)
            # Orbax's operations of all processes must be in step before a part of them has one more.
            self.tools.checkpoints.wait()
            self.local.save(moment.taken, moment.state)


@dataclasses.dataclass
class StopAfterSkipping(Hook):
    """Raises BadInput when `training.max_skipped_steps` updates in a row were skipped."""

    config: Config

    def after(self, moment: Moment) -> None:
        training = self.config.training
        # The checkpoint is there: Save has run before this hook.
        if moment.skipped < training.max_skipped_steps:
            return
        # Skipped updates do not change the parameters, so the newest checkpoint has those from before the
        # first one.
        reason = "loss or gradient was not finite"
        if training.skip_spikes is not None:
            reason += f", or more than {training.skip_spikes:g} deviations above those before,"
        raise BadInput(
            f"stage {moment.stage}: {reason} for {moment.skipped} steps in a row, up to step "
            f"{moment.taken}; lower the peak rate or look at the data; "
            f"{self.config.out}/checkpoints/{moment.taken} has the "
            "parameters before these steps"
        )


@dataclasses.dataclass
class StopOnRequest(Hook):
    """Raises KeyboardInterrupt after Ctrl-C, and Preempted after SIGTERM or SIGHUP, when the checkpoint is
    written.
    """

    checkpoints: Checkpoints
    goodput: Goodput
    steps: int  # of the whole run

    def after(self, moment: Moment) -> None:
        if moment.signal is None:
            return
        # Waited for here, where SIGTERM is held back.
        with self.goodput.spent(Spent.CHECKPOINT), working("writing the checkpoint"):
            self.checkpoints.wait()
        # Ctrl-C is a wish of the user; a signal is one of the cluster, which starts the run again.
        saved = f"saved step {moment.taken:,} of {self.steps:,}"
        if moment.signal is SIGINT:
            raise KeyboardInterrupt(saved)
        raise Preempted(f"stopped by {moment.signal.name}: {saved}")
