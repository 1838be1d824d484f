"""AdamW by an ordered list of rules, and the learning rate of a stage."""

import math
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, Bool, Float, PyTree

from babel_jax.config import OptimizerRule, OptimizerSettings, Schedule, ScheduleKind, Trained
from babel_jax.errors import BadInput
from babel_jax.model.parameters import Shaped
from babel_jax.model.shapes import is_stacked, is_table

_ROWS_MULTIPLE = 128  # of rows with moments; the tensor axis of any mesh in use divides it
_NO_ROW = np.iinfo(np.int32).max


def rule_of_each(settings: OptimizerSettings, params: PyTree[Shaped]) -> PyTree[OptimizerRule]:
    """For each parameter the first rule whose pattern matches a part of its path.

    Raises BadInput for a pattern that is no regular expression, and for a parameter that no rule covers.
    """
    for number, rule in enumerate(settings.rules):
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise BadInput(
                f"optimizer.rules.{number}.pattern: {rule.pattern!r} is no regular expression: {error}"
            ) from None

    def first(path: str) -> OptimizerRule:
        for rule in settings.rules:
            if re.search(rule.pattern, path):
                return rule
        raise BadInput(
            f"optimizer.rules: none matches the parameter {path}; add a rule, for example with the pattern "
            "'.*' at the end"
        )

    # Patterns are searched in paths such as model/layers/self_attn/q_proj/weight.
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({path: first(path) for path in flat}, sep="/")


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019) with a rate, decay and freezing for each parameter.

    p <- p - rate * rule.rate * (m / (sqrt(v) + eps) + rule.weight_decay * p), with bias-corrected moments m
    and v (v float32). Frozen parameters hold no moments. With Trained.NEW_LAYERS only the rows `new_layers`
    of the leaves under the layers are trained, and only these rows have moments: [new layers, ...].
    With Trained.NEW_ROWS the same holds for the rows `new_rows` of embedding and head; their moments are
    padded to a multiple that any mesh divides: [new rows + padding, embed].
    """

    def __init__(
        self,
        settings: OptimizerSettings,
        params: PyTree[Shaped],
        trained: Trained = Trained.ALL,
        new_layers: tuple[int, ...] = (),
        new_rows: tuple[int, ...] = (),
    ):
        self.rules = rule_of_each(settings, params)
        stacked = traverse_util.path_aware_map(lambda path, _: is_stacked(tuple(map(str, path))), params)
        self._rows, has_rows = None, stacked
        if trained is Trained.NEW_LAYERS:
            self._rows = np.asarray(new_layers)
        elif trained is Trained.NEW_ROWS:
            # Padding is a row beyond every table: it is read as zeros and never written.
            self._rows = np.full(-(-len(new_rows) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE, _NO_ROW)
            self._rows[: len(new_rows)] = new_rows
            has_rows = traverse_util.path_aware_map(lambda path, _: is_table(tuple(map(str, path))), params)
        # If only some rows are trained, a leaf that has none of these rows is frozen.
        self.trained = jax.tree.map(
            lambda has_new, rule: not rule.freeze and (self._rows is None or has_new),
            has_rows,
            self.rules,
        )
        if not any(jax.tree.leaves(self.trained)):
            raise BadInput("optimizer.rules: every parameter is frozen; leave at least one to train")
        self.clip_norm = settings.clip_norm
        self._settings = settings
        self._adam = optax.scale_by_adam(
            settings.b1, settings.b2, settings.eps, mu_dtype=jnp.dtype(settings.first_moment)
        )
        # Frozen leaves get no moments, so they cost no memory.
        self._moments = optax.masked(self._adam, self.trained)
        # A number for each leaf, or an array with one factor for each layer, if new layers have their own
        # rate.
        self._rates = jax.tree.map(
            lambda param, under_layers, rule: (
                rule.rate * (self._factors(param, new_layers) if under_layers else 1.0)
            ),
            params,
            stacked,
            self.rules,
        )

    def _factors(self, param: Shaped, new_layers: tuple[int, ...]) -> np.ndarray | float:
        """The factor of the rate for each row of a stacked leaf; one number if it is the
        same for all rows.
        """
        factor = self._settings.new_layers_rate
        # Where new layers alone are trained, all rows that are trained have one factor.
        if self._rows is not None or factor == 1.0 or not new_layers:
            return factor if self._rows is not None else 1.0
        factors = np.ones((param.shape[0], *[1] * (param.ndim - 1)), np.float32)
        factors[np.asarray(new_layers)] = factor
        return factors

    def _chosen(self, tree: PyTree[Array]) -> PyTree[Array]:
        """The trained rows of the trained leaves."""
        if self._rows is None:
            return tree
        rows = self._rows
        return jax.tree.map(
            lambda leaf, trained: _rows_of(leaf, rows) if trained else leaf, tree, self.trained
        )

    def table(self) -> str:
        """A line for each parameter: its rate, decay and pattern."""
        # One line a leaf, as the rules match paths of leaves.
        flat = traverse_util.flatten_dict(self.rules, sep="/")
        width = max(len(path) for path in flat)
        lines = [f"{'parameter':<{width}} {'rate':>8} {'decay':>8}  pattern"]
        for path, rule in flat.items():
            rate, decay = ("frozen", "") if rule.freeze else (f"{rule.rate:g}", f"{rule.weight_decay:g}")
            lines.append(f"{path:<{width}} {rate:>8} {decay:>8}  {rule.pattern}")
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """A line for each pattern that matches no parameter first; it may have a mistake in it."""
        used = traverse_util.flatten_dict(self.rules, sep="/").values()
        idle = [rule.pattern for rule in self._settings.rules if rule not in used]
        return [f"the pattern {pattern} wins for no parameter" for pattern in idle]

    def init(self, params: PyTree[Array]) -> optax.OptState:
        """Zero moments."""
        return self._moments.init(self._chosen(params))

    def carried_over(self, state: optax.OptState, before: "AdamW", params: PyTree[Array]) -> optax.OptState:
        """The moments of the optimizer `before` where both train a parameter; zeros where only this one does.

        May be traced.
        """
        # `rows` are the trained layers; None means all layers.
        rows, rows_before = self._rows, before._rows

        def carried(fresh: Array, old: Array) -> Array:
            # From some rows to all rows: the other rows begin with zeros. `drop` leaves out the padding.
            if rows is None and rows_before is not None:
                return fresh.at[rows_before].set(old, mode="drop")
            # Both train all rows, or both the same ones: unchanged. From all rows to some: these rows alone.
            return old if rows is None or rows_before is not None else _rows_of(old, rows)

        def is_masked(leaf: Any) -> bool:
            return isinstance(leaf, optax.MaskedNode)

        # A leaf that one of the two optimizers freezes keeps its fresh value: zeros, or no moments.
        def moments(fresh: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(
                lambda new, was: new if is_masked(new) or is_masked(was) else carried(new, was),
                fresh,
                old,
                is_leaf=is_masked,
            )

        fresh, old = self.init(params).inner_state, state.inner_state
        return optax.MaskedState(
            optax.ScaleByAdamState(old.count, moments(fresh.mu, old.mu), moments(fresh.nu, old.nu))
        )

    def shardings(
        self, params: PyTree[Shaped], param_shardings: PyTree, other: jax.sharding.Sharding
    ) -> PyTree:
        """A sharding for each leaf of the state: a moment has the sharding of its parameter, the rest
        `other`.
        """
        state = jax.eval_shape(self.init, params)
        # The tree of shardings must have the structure of the state, which has a MaskedNode for each frozen
        # leaf.
        with_moments = jax.tree.map(
            lambda sharding, trained: sharding if trained else optax.MaskedNode(),
            param_shardings,
            self.trained,
        )
        return optax.tree_map_params(
            self._moments,
            lambda _, sharding: sharding,
            state,
            with_moments,
            transform_non_params=lambda _: other,
        )

    def norm(self, gradients: PyTree[Array]) -> Float[Array, ""]:
        """The global norm of the gradients of trained parameters."""
        squares = jax.tree.map(
            lambda gradient, trained: jnp.sum(jnp.square(gradient)) if trained else jnp.zeros(()),
            self._chosen(gradients),
            self.trained,
        )
        return jnp.sqrt(sum(jax.tree.leaves(squares)))

    def update(
        self,
        gradients: PyTree[Array],
        state: optax.OptState,
        params: PyTree[Array],
        rate: Float[Array, ""],
        kept: Bool[Array, ""] | bool = True,
        offload: bool = False,
    ) -> tuple[PyTree[Array], optax.OptState]:
        """New parameters and moments. Where `kept` is false, the old ones, bit by bit.

        With `offload` the moments of one parameter at a time are copied from the hosts' memory and back.
        """
        # One parameter at a time, in a fixed order: with offloaded moments, only one parameter's moments are
        # on the devices.
        before, structure = state.inner_state, cast(Any, jax.tree.structure(params))
        trees = (params, gradients, before.mu, before.nu, self.rules, self._rates, self.trained)
        # `last` is a value of the parameter before. With `offload`, each copy waits for it.
        last, found = jnp.asarray(kept), []
        for param, gradient, mu, nu, rule, factor, trained in zip(
            *map(structure.flatten_up_to, trees), strict=True
        ):
            if not trained:
                found.append((param, mu, nu))
                continue
            if offload:
                # After the moments of the parameter before; else XLA would copy all moments at once.
                mu, nu, last = jax.lax.optimization_barrier((mu, nu, last))
                mu, nu = jax.device_put((mu, nu), jax.memory.Space.Device)
            # If only some rows are trained, the update is of these rows, and `moved` is written back into the
            # leaf.
            part = param
            if self._rows is not None:
                part, gradient = _rows_of(param, self._rows), _rows_of(gradient, self._rows)
            # AdamW (Loshchilov and Hutter 2019): the decay is added to Adam's direction, not to the gradient.
            direction, after = self._adam.update(gradient, optax.ScaleByAdamState(before.count, mu, nu))
            moved = part - rate * factor * (direction + rule.weight_decay * part)
            # A step that is skipped keeps the old values, bit by bit.
            pairs = ((moved, part), (after.mu, mu), (after.nu, nu))
            moved, mu, nu = (jnp.where(kept, new, old) for new, old in pairs)
            if offload:
                mu, nu, last = jax.lax.optimization_barrier((mu, nu, last))
                mu, nu = jax.device_put((mu, nu), jax.memory.Space.Host)
            if self._rows is not None:
                moved = param.at[self._rows].set(moved, mode="drop")
            found.append((moved, mu, nu))
        # Adam's bias correction counts the updates that are in the moments, so skipped ones do not count.
        count = jnp.where(kept, optax.safe_increment(before.count), before.count)
        params, mu, nu = (structure.unflatten(values) for values in zip(*found, strict=True))
        return params, state._replace(inner_state=before._replace(count=count, mu=mu, nu=nu))


def _rows_of(leaf: Array, rows: np.ndarray) -> Array:
    """Rows of a leaf along its first axis; zeros for rows beyond it."""
    return leaf.at[rows].get(mode="fill", fill_value=0)


def learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    """The rate of a step of a stage; `step` is 0 .. steps - 1.

    First a linear warmup over `warmup_fraction` of the steps. Then, by kind: constant; a half cosine down to
    `final_fraction` of the peak; or constant, and over the last `decay_fraction` of the steps a linear fall
    to `final_fraction` of the peak (warmup-stable-decay, Hu et al. 2024).
    """
    # Step 0 already has a rate above 0: an update with the rate 0 would be lost.
    warmup = round(schedule.warmup_fraction * steps)
    if step < warmup:
        return schedule.peak * (step + 1) / warmup
    final = schedule.peak * schedule.final_fraction
    match schedule.kind:
        case ScheduleKind.CONSTANT:
            return schedule.peak
        case ScheduleKind.COSINE:
            done = (step - warmup) / max(1, steps - warmup)
            return final + (schedule.peak - final) * 0.5 * (1.0 + math.cos(math.pi * done))
        case ScheduleKind.WSD:
            # The last step has the final rate.
            decay = round(schedule.decay_fraction * steps)
            if step < steps - decay:
                return schedule.peak
            return schedule.peak - (schedule.peak - final) * (step - (steps - decay) + 1) / decay
