"""The stages of a run in steps: budgets and mixtures."""

import itertools
import sys
from collections.abc import Sequence
from typing import NamedTuple

from babel_jax.config import Config, Stage
from babel_jax.data.batches.mixture import Mixture, make_mixture, make_mixture_of_steps, tokens_per_window
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.languages import with_order


class PlannedStage(NamedTuple):
    """A stage with its first step in the run (`start`), the step after its last (`end`), its mixture, and the
    tokens that it reads, without padding.

    asked: the tokens that the stage's budget asks for, where `max_passes` allows fewer; else None.
    """

    stage: Stage
    start: int
    end: int
    mixture: Mixture
    tokens: int
    asked: int | None = None


def run_order(config: Config, stages: Sequence[PlannedStage]) -> tuple[str, ...]:
    """The languages of a run in its own order: the config's, then others that its mixtures read."""
    mixtures = (plan.mixture.languages for plan in stages)
    return with_order(config.order, itertools.chain.from_iterable(mixtures))


def plan_stages(config: Config) -> list[PlannedStage]:
    """Budgets in steps and mixtures of all stages.

    Raises BadInput for a mixture that the prepared data cannot give.
    """
    supplies = open_prepared(config.data.folder).supplies
    available = {key: supply.tokens for key, supply in supplies.items()}
    windows_per_step = config.training.global_batch_size
    planned, start = [], 0
    for stage in config.stages:
        # The most tokens that the stage may read: `max_passes` times all prepared text.
        most = (
            round(stage.max_passes * sum(available.values())) if stage.max_passes is not None else sys.maxsize
        )
        # A stage is given by steps, by tokens, or by passes over all text; `max_passes` bounds each of them.
        asked = stage.tokens or 0
        if stage.steps:
            mixture, tokens = make_mixture_of_steps(supplies, stage.mixture, stage.steps * windows_per_step)
            steps, asked = stage.steps, tokens
        # A stage by steps that would read more than `max_passes` allows is planned again, by tokens.
        if not stage.steps or tokens > most:
            tokens = max(1, min(most, stage.tokens or most))
            mixture = make_mixture(available, stage.mixture, tokens)
            steps = max(1, round(tokens / (windows_per_step * tokens_per_window(mixture, supplies))))
        is_cut = asked > tokens
        planned.append(PlannedStage(stage, start, start + steps, mixture, tokens, asked if is_cut else None))
        start += steps
    return planned
