"""The effect of each layer of a model, by language: the cosine similarity of the residual stream before and
after it, and the loss without it and with it applied twice.

A layer that can be applied twice at little cost is a good one to copy; see `layers_to_double`.
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
from babel_jax.errors import NOT_FINITE, BadInput
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
    """Bits per byte by language: of the model, and for each layer of the model without it (removed) and with
    it applied twice (doubled).

    cosine: for each layer, the mean over tokens of the cosine similarity of the residual stream before and
    after it.
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
    """The sensitivity of every layer: 2 * layers + 1 passes over the texts, with one compiled program.

    `params` must be on `mesh`; the windows of a batch are spread over it.
    """
    layers = config.num_hidden_layers
    # Orders of layers, all of one length so that one program serves: -1 is no layer.
    whole = np.array([*range(layers), -1], np.int32)
    without = [np.where(whole == layer, -1, whole) for layer in range(layers)]
    twice = [np.array([*range(layer + 1), *range(layer, layers)], np.int32) for layer in range(layers)]

    def bits_and_cosines(order: np.ndarray) -> tuple[ByLanguage, dict[str, np.ndarray]]:
        bits, cosines = {}, {}
        for language, text in texts.items():
            sums = []
            for batch in text.batches:
                arrays = _filled(batch, mesh)
                sums.append(_nats_and_cosines(mesh, config, jnp.dtype(compute_dtype), params, order, *arrays))
            nats, cosine_sums, tokens = (
                np.sum(np.asarray(column, np.float64), axis=0) for column in zip(*sums, strict=True)
            )
            if not np.isfinite(nats):
                raise BadInput(NOT_FINITE)
            bits[language] = float(nats) / float(np.log(2)) / text.bytes
            cosines[language] = cosine_sums / tokens
        return bits, cosines

    model, cosines = bits_and_cosines(whole)
    orders = tqdm([*without, *twice], "sensitivity", unit=" passes", leave=False, disable=None)
    changed = [bits_and_cosines(order)[0] for order in orders]

    cosines_by_layer = []
    for layer in range(layers):
        cosines_by_layer.append({language: float(values[layer]) for language, values in cosines.items()})
    return Sensitivity(model, cosines_by_layer, changed[:layers], changed[layers:])


def _filled(batch: tuple[np.ndarray, ...], mesh: Mesh) -> list[np.ndarray]:
    """The batch, filled up with windows of padding so that each device has the same number."""
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
    """Sums over a batch: nats of the predicted tokens, cosines of all tokens at each step, and the number of
    tokens.
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
        # One sum over the devices instead of three: on CPUs, independent collectives may run in another order
        # on each device.
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


def layers_to_double(result: Sensitivity, count: int) -> tuple[int, ...]:
    """The `count` layers, in order, whose repetition raises bits per byte least, over all languages.

    Raises ValueError if the model has fewer layers.
    """
    costs = [_mean(values) for values in result.doubled]
    if not 0 < count <= len(costs):
        raise ValueError(f"{count} layers of {len(costs)}")
    cheapest = sorted(range(len(costs)), key=lambda layer: costs[layer])[:count]
    return tuple(sorted(cheapest))


def sensitivity_table(result: Sensitivity) -> str:
    """Markdown: a row for each layer. The changes are of bits per byte against the whole model, in
    percent.
    """
    groups = [group for group in ("all", "high", "low") if class_means(result.model)[group] is not None]
    heads = []
    for name in ("cosine", "removed", "doubled"):
        heads += [f"{name}, {group}" for group in groups]
    lines = ["| layer | " + " | ".join(heads) + " |", "| ---: |" + " ---: |" * len(heads)]
    for layer in range(len(result.cosine)):
        cells = [f"{_mean(result.cosine[layer], group):.3f}" for group in groups]
        for values in (result.removed, result.doubled):
            cells += [f"{_change(result, values[layer], group):+.1f}%" for group in groups]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_sensitivity(path: Path, result: Sensitivity) -> None:
    """A PNG: above, the cosine similarity by layer; below, the change of bits per byte with the layer removed
    or doubled.
    """
    with saved_figure(path, 2, (10, 8)) as (cosines, changes):
        layers = range(len(result.cosine))
        groups = {"all": "-", "high": "--", "low": ":"}
        for group, style in groups.items():
            if class_means(result.model)[group] is None:
                continue
            label = {"all": "all languages", "high": "high-resource", "low": "low-resource"}[group]
            cosines.plot(
                layers,
                [_mean(values, group) for values in result.cosine],
                f"k{style}",
                marker=".",
                label=label,
            )
            for name, color, values in (
                ("removed", "tab:red", result.removed),
                ("doubled", "tab:blue", result.doubled),
            ):
                change = [_change(result, by_language, group) for by_language in values]
                changes.plot(layers, change, style, color=color, marker=".", label=f"{name}, {label}")
        cosines.set_ylabel("cosine of the stream before and after")
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


def _change(result: Sensitivity, by_language: ByLanguage, group: str) -> float:
    return 100 * (_mean(by_language, group) / _mean(result.model, group) - 1)
