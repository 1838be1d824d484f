"""A run that is deepened midway: which model it has at which step, and the state of the deeper one."""

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
from babel_jax.expansion.apply import expand_config, expand_params
from babel_jax.expansion.plan import ExpansionPlan, plan_from_settings
from babel_jax.model.parameters import is_stacked


class Depth(NamedTuple):
    """The model of a run from the step `start` on. `plan` makes it of the one before; None for the first.

    `new_layers` are those that the last expansion added, before the run or in it.
    """

    start: int
    config: ModelConfig
    new_layers: tuple[int, ...]
    plan: ExpansionPlan | None = None
    moments: Moments = Moments.COPY


def depths(config: ModelConfig, new_layers: tuple[int, ...], deepenings: Sequence[Deepening]) -> list[Depth]:
    """The models of a run, in order. Raises BadInput for a plan that does not fit the depth that it meets."""
    found = [Depth(0, config, new_layers)]
    for number, deepening in enumerate(deepenings):
        config = found[-1].config
        try:
            plan = plan_from_settings(deepening.expansion, config.num_hidden_layers)
            found.append(
                Depth(deepening.step, expand_config(config, plan), plan.new_layers, plan, deepening.moments)
            )
        except BadInput as problem:
            raise BadInput(f"deepen.{number}: {problem}") from None
    return found


def depth_at(models: Sequence[Depth], step: int) -> Depth:
    """The model that takes a step of the run.

    The checkpoint after n steps has the one of step n - 1: it is written before the change.
    """
    return [model for model in models if model.start <= max(step, 0)][-1]


def expand_state(
    params: PyTree[Array], moments: optax.OptState, deeper: Depth
) -> tuple[PyTree[Array], optax.OptState]:
    """Parameters and Adam moments (of all layers) of the deeper model. May be traced.

    Kept layers keep their moments; those of a new layer are its source's, or zeros. The count, which corrects
    the bias of young moments, goes on.
    """
    assert deeper.plan is not None
    expand = partial(_expand_moments, plan=deeper.plan, moments=deeper.moments)
    adam = moments.inner_state
    return expand_params(params, deeper.plan), moments._replace(
        inner_state=adam._replace(mu=expand(adam.mu), nu=expand(adam.nu))
    )


def _expand_moments(tree: PyTree[Array], plan: ExpansionPlan, moments: Moments) -> PyTree[Array]:
    def deeper(path: tuple[Any, ...], leaf: Any) -> Any:
        if not is_stacked(path) or isinstance(leaf, optax.MaskedNode):
            return leaf
        expanded = jnp.take(leaf, np.asarray(plan.source_layers), axis=0, mode="clip")
        return expanded if moments is Moments.COPY else expanded.at[np.asarray(plan.new_layers)].set(0)

    return traverse_util.path_aware_map(deeper, tree)
