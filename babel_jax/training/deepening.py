"""Expansion in the middle of a run: the model at each step, and the state of the deeper model."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, PyTree

from babel_jax.config import Deepening, ModelConfig, Moments
from babel_jax.errors import BadInput
from babel_jax.expansion.apply import expand_params
from babel_jax.expansion.folders import expand_config
from babel_jax.expansion.plan import ExpansionPlan, plan_from_settings
from babel_jax.model.shapes import is_stacked


class Depth(NamedTuple):
    """The model of a run from step `start` on. `plan` expands the model before it; None for the first model.

    `new_layers` are the layers that the last expansion added, before the run or during it. `new_rows` are the
    ids of the tokens that the last extension of the vocabulary added.
    """

    start: int
    config: ModelConfig
    new_layers: tuple[int, ...]
    plan: ExpansionPlan | None = None
    moments: Moments = Moments.COPY
    new_rows: tuple[int, ...] = ()


def depths(
    config: ModelConfig,
    new_layers: tuple[int, ...],
    deepenings: Sequence[Deepening],
    new_rows: tuple[int, ...] = (),
) -> list[Depth]:
    """The models of a run, in order. Raises BadInput for a plan that does not fit the depth before it."""
    found = [Depth(0, config, new_layers, new_rows=new_rows)]
    for number, deepening in enumerate(deepenings):
        # Each plan is for the model that the plan before it has made.
        config = found[-1].config
        try:
            plan = plan_from_settings(deepening.expansion, config.num_hidden_layers)
            deeper = expand_config(config, plan)
            found.append(Depth(deepening.step, deeper, plan.new_layers, plan, deepening.moments, new_rows))
        except BadInput as problem:
            raise BadInput(f"deepen.{number}: {problem}") from None
    return found


def depth_at(models: Sequence[Depth], step: int) -> Depth:
    """The model that takes step `step` of the run.

    The checkpoint after n steps has the model of step n - 1, because it is written before the expansion.
    """
    return [model for model in models if model.start <= max(step, 0)][-1]


def expand_state(
    params: PyTree[Array], moments: optax.OptState, deeper: Depth
) -> tuple[PyTree[Array], optax.OptState]:
    """Parameters and Adam moments (of all layers) of the deeper model. May be traced.

    Old layers keep their moments. A new layer has the moments of its source, or zeros. Adam's step count,
    which corrects the bias of young moments, is kept.
    """
    assert deeper.plan is not None
    expand = partial(_expand_moments, plan=deeper.plan, moments=deeper.moments)
    # The outer state of the optimizer has no arrays of layers.
    adam = moments.inner_state
    return expand_params(params, deeper.plan), moments._replace(
        inner_state=adam._replace(mu=expand(adam.mu), nu=expand(adam.nu))
    )


def _expand_moments(tree: PyTree[Array], plan: ExpansionPlan, moments: Moments) -> PyTree[Array]:
    def deeper(path: tuple[Any, ...], leaf: Any) -> Any:
        if not is_stacked(path) or isinstance(leaf, optax.MaskedNode):
            return leaf
        # The same gather as for parameters. "clip" compiles to less than the default, which fills rows that
        # are out of range.
        expanded = jnp.take(leaf, np.asarray(plan.source_layers), axis=0, mode="clip")
        return expanded if moments is Moments.COPY else expanded.at[np.asarray(plan.new_layers)].set(0)

    return traverse_util.path_aware_map(deeper, tree)
