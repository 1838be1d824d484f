"""AdamW by an ordered list of rules, and the learning rate of a stage."""

import math
import re

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float, PyTree

from babel_jax.config import OptimizerRule, OptimizerSettings, Schedule, ScheduleKind
from babel_jax.errors import BadInput


def rule_of_each(settings: OptimizerSettings, params: PyTree[Array]) -> PyTree[OptimizerRule]:
    """The first rule whose pattern is found in each parameter's path.

    Raises BadInput for a pattern that is no regular expression, and for a parameter that no rule covers.
    """
    for number, rule in enumerate(settings.rules):
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise BadInput(f"optimizer.rules.{number}.pattern: {rule.pattern!r} is no regular expression: {error}") from None

    def first(path: str) -> OptimizerRule:
        for rule in settings.rules:
            if re.search(rule.pattern, path):
                return rule
        raise BadInput(f"optimizer.rules: none matches the parameter {path}; add a rule, for example with the pattern '.*' at the end")

    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({path: first(path) for path in flat}, sep="/")


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019) with a rate, decay and freezing for each parameter.

    p <- p - rate * rule.rate * (m / (sqrt(v) + eps) + rule.weight_decay * p), with bias-corrected float32 moments m and v.
    Frozen parameters hold no moments.
    """

    def __init__(self, settings: OptimizerSettings, params: PyTree[Array]):
        self.rules = rule_of_each(settings, params)
        self.trained = jax.tree.map(lambda rule: not rule.freeze, self.rules, is_leaf=lambda rule: isinstance(rule, OptimizerRule))
        if not any(jax.tree.leaves(self.trained)):
            raise BadInput("optimizer.rules: every parameter is frozen; leave at least one to train")
        self.clip_norm = settings.clip_norm
        self._settings = settings
        self._moments = optax.masked(optax.scale_by_adam(settings.b1, settings.b2, settings.eps), self.trained)

    def table(self) -> str:
        """What each parameter is given, a line for each, and below them the patterns that win for none."""
        flat = traverse_util.flatten_dict(self.rules, sep="/")
        width = max(len(path) for path in flat)
        lines = [f"{'parameter':<{width}} {'rate':>8} {'decay':>8}  pattern"]
        for path, rule in flat.items():
            rate, decay = ("frozen", "") if rule.freeze else (f"{rule.rate:g}", f"{rule.weight_decay:g}")
            lines.append(f"{path:<{width}} {rate:>8} {decay:>8}  {rule.pattern}")
        idle = [rule.pattern for rule in self._settings.rules if rule not in flat.values()]
        return "\n".join([*lines, *(f"warning: the pattern {pattern} wins for no parameter" for pattern in idle)])

    def init(self, params: PyTree[Array]) -> optax.OptState:
        """Zero moments."""
        return self._moments.init(params)

    def shardings(self, params: PyTree[Array], param_shardings: PyTree, other: jax.sharding.Sharding) -> PyTree:
        """A sharding for each part of the state: a moment has that of its parameter, the rest has `other`."""
        state = jax.eval_shape(self.init, params)
        with_moments = jax.tree.map(lambda sharding, trained: sharding if trained else optax.MaskedNode(), param_shardings, self.trained)
        return optax.tree_map_params(self._moments, lambda _, sharding: sharding, state, with_moments, transform_non_params=lambda _: other)

    def norm(self, gradients: PyTree[Array]) -> Float[Array, ""]:
        """The global norm of the gradients of parameters that are trained."""
        squares = jax.tree.map(
            lambda gradient, trained: jnp.sum(jnp.square(gradient)) if trained else jnp.zeros(()), gradients, self.trained
        )
        return jnp.sqrt(sum(jax.tree.leaves(squares)))

    def update(
        self, gradients: PyTree[Array], state: optax.OptState, params: PyTree[Array], rate: Float[Array, ""]
    ) -> tuple[PyTree[Array], optax.OptState]:
        """New parameters and moments."""
        directions, state = self._moments.update(gradients, state, params)

        def moved(param: Array, direction: Array, rule: OptimizerRule) -> Array:
            return param if rule.freeze else param - rate * rule.rate * (direction + rule.weight_decay * param)

        return jax.tree.map(moved, params, directions, self.rules), state


def learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    """The rate of step 0 .. steps - 1 of a stage.

    Linear warmup over the first `warmup_fraction` of the steps; then constant, or a half cosine down to `final_fraction` of the peak, or
    (warmup-stable-decay, Hu et al. 2024) constant until the last `decay_fraction` of the steps falls linearly to it.
    """
    warmup = round(schedule.warmup_fraction * steps)
    if step < warmup:
        return schedule.peak * (step + 1) / warmup
    final = schedule.peak * schedule.final_fraction
    if schedule.kind is ScheduleKind.COSINE:
        done = (step - warmup) / max(1, steps - warmup)
        return final + (schedule.peak - final) * 0.5 * (1.0 + math.cos(math.pi * done))
    decay = round(schedule.decay_fraction * steps)
    if schedule.kind is ScheduleKind.WSD and step >= steps - decay:
        return schedule.peak - (schedule.peak - final) * (step - (steps - decay) + 1) / decay
    return schedule.peak
