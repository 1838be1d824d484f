"""Everything a step needs: optimizer, shardings and compiled programs, for one depth of the model and one
choice of what is trained.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from babel_jax.config import Config, OptimizerSettings, Trained
from babel_jax.model.decoder import abstract_params
from babel_jax.training.corruption import BitChecks
from babel_jax.training.deepening import Depth, expand_state
from babel_jax.training.optimizer import AdamW
from babel_jax.training.run_state import abstract_state
from babel_jax.training.step import Step, TrainState, compiled_step, initial_state, state_shardings


class Setup(NamedTuple):
    """One depth of the model and one choice of what is trained. `abstract` is the state as shapes, types and
    shardings.
    """

    model: Depth
    trained: Trained
    optimizer: AdamW
    shardings: TrainState
    abstract: TrainState
    step: Step
    bit_checks: BitChecks


def setup_of(config: Config, mesh: Mesh, model: Depth, trained: Trained, languages: int) -> Setup:
    """The setup of one model and one choice of what is trained, in a run with so many languages."""
    # Shapes alone: the setup of a model of any size is made without memory.
    params = abstract_params(model.config)
    optimizer = AdamW(config.optimizer, params, trained, model.new_layers, model.new_rows)
    shardings = state_shardings(model.config, optimizer, mesh, config.training.offload_optimizer_state)
    abstract = abstract_state(
        jax.eval_shape(lambda params: initial_state(optimizer, params, languages), params), shardings
    )
    step = compiled_step(model.config, optimizer, config.optimizer, config.training, mesh)
    # Compiled at their first call.
    bit_checks = BitChecks(model.config, config.optimizer, config.training, mesh)
    return Setup(model, trained, optimizer, shardings, abstract, step, bit_checks)


def carried_over(state: TrainState, before: Setup, after: Setup, settings: OptimizerSettings) -> TrainState:
    """The state for another setup: of a deeper model, or with the moments of another choice of what is
    trained.
    """
    params, opt_state = carrying_over(before, after, settings)(state.params, state.opt_state)
    return dataclasses.replace(state, params=params, opt_state=opt_state)


def carrying_over(before: Setup, after: Setup, settings: OptimizerSettings) -> Any:
    """The program of `carried_over`, a jitted function of parameters and moments."""

    def carry_over(params: PyTree[Array], opt_state: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        opt_state = jax.device_put(opt_state, jax.memory.Space.Device)  # offloaded moments are on the host
        if before.model is after.model:
            return params, after.optimizer.carried_over(opt_state, before.optimizer, params)
        # Expansion needs moments of every layer: fill up to all layers, expand, then keep what `after`
        # trains.
        whole, deeper = (AdamW(settings, abstract_params(setup.model.config)) for setup in (before, after))
        params, opt_state = expand_state(
            params, whole.carried_over(opt_state, before.optimizer, params), after.model
        )
        return params, after.optimizer.carried_over(opt_state, deeper, params)

    return jax.jit(carry_over, out_shardings=(after.shardings.params, after.shardings.opt_state))
