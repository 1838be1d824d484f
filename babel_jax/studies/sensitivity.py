"""How much each layer of a model matters, by language: how like the residual stream is before and behind it,
and the loss without it and with it twice.

A layer that may be passed twice at little cost is a good one to copy; see `layers_to_double`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree
from tqdm import tqdm

from babel_jax.config import ModelConfig
from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.scoring import rows_of_batch
from babel_jax.model.cross_entropy import target_logits
from babel_jax.model.decoder import hidden_in_order, output_table
from babel_jax.model.execution import Execution
from babel_jax.model.parallel import ROW_AXES
from babel_jax.model.sharding import parallelism_on, param_specs
from babel_jax.plots import saved_figure
from babel_jax.studies.packed_text import EncodedText
from babel_jax.training.loss import target_mask

ByLanguage = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Bits per byte by language: of the model, and for each layer of the model without it and with it twice
    in a row.

    `cosine` is, for each layer, the mean over tokens of the cosine similarity of the residual stream before
    and behind it.
    """

    model: ByLanguage
    cosine: list[ByLanguage]
    removed: list[ByLanguage]
    doubled: list[ByLanguage]


def sensitivity(
    config: ModelConfig,
    params: PyTree[Array],
    texts: Mapping[str, EncodedText],
    mesh: Mesh,
    compute_dtype: DTypeLike = jnp.float32,
) -> Sensitivity:
    """Measures every layer: 2 * layers + 1 passes over the texts, by one compiled program.

    `params` lie on `mesh`, over which the windows of a batch are spread.
    """
    layers = config.num_hidden_layers
    whole = np.array([*range(layers), -1], np.int32)
    without = [np.where(whole == layer, -1, whole) for layer in range(layers)]
    twice = [np.array([*range(layer + 1), *range(layer, layers)], np.int32) for layer in range(layers)]

    def measured(order: np.ndarray) -> tuple[ByLanguage, dict[str, np.ndarray]]:
        bits, cosines = {}, {}
        for language, text in texts.items():
            sums = [
                _nats_and_cosines(
                    mesh, config, jnp.dtype(compute_dtype), params, order, *_filled(batch, mesh)
                )
                for batch in text.batches
            ]
            nats, cosine_sums, tokens = (
                np.sum(np.asarray(column, np.float64), axis=0) for column in zip(*sums, strict=True)
            )
            bits[language] = float(nats) / float(np.log(2)) / text.bytes
            cosines[language] = cosine_sums / tokens
        return bits, cosines

    model, cosines = measured(whole)
    orders = tqdm([*without, *twice], "sensitivity", unit=" passes", leave=False, disable=None)
    changed = [measured(order)[0] for order in orders]
    by_layer = [
        {language: float(values[layer]) for language, values in cosines.items()} for layer in range(layers)
    ]
    return Sensitivity(model, by_layer, changed[:layers], changed[layers:])


def _filled(batch: tuple[np.ndarray, ...], mesh: Mesh) -> list[np.ndarray]:
    """The batch, with windows of padding so that each device has as many."""
    devices = rows_of_batch(1, 1, mesh, ROW_AXES)
    return [np.pad(rows, ((0, -len(rows) % devices), (0, 0))) for rows in batch]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _nats_and_cosines(
    mesh: Mesh,
    config: ModelConfig,
    compute_dtype: np.dtype,
    params: PyTree[Array],
    order: Int[Array, "steps"],
    tokens: Int[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    loss_mask: Int[Array, "batch time"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "steps"], Float[Array, ""]]:
    """Summed over a batch: nats of the predicted tokens, cosines of all tokens at each step, and how many
    tokens there are.
    """
    parallel = parallelism_on(mesh, whole_windows=True)

    def of_own_windows(
        params: PyTree[Array], order: Array, tokens: Array, segment_ids: Array, loss_mask: Array | None
    ) -> tuple[Array, Array, Array]:
        hidden, cosines = hidden_in_order(
            config, params, order, tokens, segment_ids, Execution(compute_dtype, parallel=parallel)
        )
        rows, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
        picked, log_z = target_logits(
            rows, output_table(config, params), targets, config.final_logit_softcapping, parallel
        )
        nats = jnp.where(target_mask(segment_ids, loss_mask).reshape(-1), log_z - picked, 0.0)
        real = segment_ids > 0
        sums = jnp.sum(jnp.where(real, cosines, 0.0), axis=(1, 2))
        # One sum over the devices and not three: collectives that do not depend on each other may be run in
        # any order on CPUs.
        together = jnp.concatenate([jnp.sum(nats)[None], sums, jnp.sum(real).astype(jnp.float32)[None]])
        together = parallel.all_reduce(together, ROW_AXES)
        return together[0], together[1:-1], together[-1]

    arguments: tuple[Any, ...] = (params, order, tokens, segment_ids, loss_mask)
    if parallel.is_single_device:
        return of_own_windows(*arguments)
    rows, same = PartitionSpec(ROW_AXES), PartitionSpec()
    in_specs = (param_specs(config), same, rows, rows, same if loss_mask is None else rows)
    return jax.shard_map(of_own_windows, mesh=mesh, in_specs=in_specs, out_specs=same, check_vma=False)(
        *arguments
    )


def layers_to_double(found: Sensitivity, count: int) -> tuple[int, ...]:
    """The `count` layers, in their order, that passed twice cost least in bits per byte over all languages.

    Raises ValueError for more than there are.
    """
    costs = [_mean(values) for values in found.doubled]
    if not 0 < count <= len(costs):
        raise ValueError(f"{count} layers of {len(costs)}")
    return tuple(sorted(sorted(range(len(costs)), key=lambda layer: costs[layer])[:count]))


def sensitivity_table(found: Sensitivity) -> str:
    """Markdown: a row for each layer; the changes are of bits per byte against the whole
    model, in percent.
    """
    groups = [group for group in ("all", "high", "low") if class_means(found.model)[group] is not None]
    heads = [f"{what}, {group}" for what in ("cosine", "removed", "doubled") for group in groups]
    lines = ["| layer | " + " | ".join(heads) + " |", "| ---: |" + " ---: |" * len(heads)]
    for layer in range(len(found.cosine)):
        cosines = [f"{_mean(found.cosine[layer], group):.3f}" for group in groups]
        changes = [
            f"{_change(found, values[layer], group):+.1f}%"
            for values in (found.removed, found.doubled)
            for group in groups
        ]
        lines.append(f"| {layer} | " + " | ".join([*cosines, *changes]) + " |")
    return "\n".join(lines)


def plot_sensitivity(path: Path, found: Sensitivity) -> None:
    """A PNG: cosine similarity by layer above, the change of bits per byte with the layer removed or doubled
    below.
    """
    with saved_figure(path, 2, (10, 8)) as (cosines, changes):
        layers = range(len(found.cosine))
        groups = {"all": "-", "high": "--", "low": ":"}
        for group, style in groups.items():
            if class_means(found.model)[group] is None:
                continue
            label = {"all": "all languages", "high": "high-resource", "low": "low-resource"}[group]
            cosines.plot(
                layers,
                [_mean(values, group) for values in found.cosine],
                f"k{style}",
                marker=".",
                label=label,
            )
            for name, color, values in (
                ("removed", "tab:red", found.removed),
                ("doubled", "tab:blue", found.doubled),
            ):
                change = [_change(found, by_language, group) for by_language in values]
                changes.plot(layers, change, style, color=color, marker=".", label=f"{name}, {label}")
        cosines.set_ylabel("cosine of the stream before and behind")
        cosines.set_title("Similarity of each layer's input and output")
        changes.set_yscale("symlog", linthresh=1)
        changes.set_ylabel("change of bits per byte, %")
        changes.set_xlabel("layer")
        changes.set_title("Loss with a layer removed, and with it passed twice")
        for axes in (cosines, changes):
            axes.grid(alpha=0.3)
            axes.legend(ncols=2)


def _mean(by_language: ByLanguage, group: str = "all") -> float:
    mean = class_means(by_language)[group]
    return float("nan") if mean is None else mean


def _change(found: Sensitivity, by_language: ByLanguage, group: str) -> float:
    return 100 * (_mean(by_language, group) / _mean(found.model, group) - 1)
