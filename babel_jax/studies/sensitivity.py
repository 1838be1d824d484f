"""The effect of each layer of a model, by language: the cosine similarity of the residual stream before and
after it, and the loss without it and with it applied twice.

A layer that can be applied twice at little cost is a good one to copy; see `layers_to_double`.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from babel_jax.config import ModelConfig
from babel_jax.errors import NOT_FINITE, BadInput
from babel_jax.evaluation.bits_per_byte import class_mean, class_means
from babel_jax.evaluation.scoring import rows_of_batch
from babel_jax.model.cross_entropy import target_logits
from babel_jax.model.decoder import embedded, normed, output_table, run_layers
from babel_jax.model.execution import Execution
from babel_jax.model.parallel import ROW_AXES, Parallelism
from babel_jax.model.sharding import parallelism_on, param_specs
from babel_jax.plots import BAD, INK, SERIES, saved_figure
from babel_jax.progress import Work
from babel_jax.studies.packed_text import EncodedText, Window
from babel_jax.training.loss import target_mask

ByLanguage = dict[str, float]
LANGUAGES_IN_TABLE = 6
_ROWS_AT_ONCE = 8  # windows on each device: fewer use the processor badly, more need more memory


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


class LayerEffect(NamedTuple):
    """The values of one layer in a `Sensitivity`."""

    cosine: ByLanguage
    removed: ByLanguage
    doubled: ByLanguage


class _Batch(NamedTuple):
    """Windows of one shape, and the language of each; "" for windows of padding."""

    arrays: Window
    languages: list[str]


def sensitivity(
    config: ModelConfig,
    params: PyTree[Array],
    texts: Mapping[str, EncodedText],
    mesh: Mesh,
    compute_dtype: DTypeLike = jnp.float32,
    known: Mapping[int, LayerEffect] = {},
    found: Callable[[int, LayerEffect], None] = lambda *_: None,
) -> Sensitivity:
    """The sensitivity of every layer.

    The text goes through the model once, layer by layer. After each layer, only the layers above it run
    again, without it and with it applied twice. So this costs about as much as one pass for each layer.

    `params` must be on `mesh`; the windows of a batch are spread over it. `found` is called with the effect
    of each layer; the effects that are `known` are not computed again.
    """
    batches, layers = _batches(texts, mesh), config.num_hidden_layers
    program = functools.partial(_run, mesh, config, jnp.dtype(compute_dtype))
    # The residual streams of all batches stay in memory, so that each layer reads the text only once.
    streams = []
    for batch in batches:
        stream, _ = program(_Part.EMBED, params, 0, None, batch.arrays)
        streams.append(stream)
    tokens = {language: _tokens(text) for language, text in texts.items()}
    effects: list[LayerEffect] = []
    for layer in Work("sensitivity", range(layers), unit="layers"):
        part = _Part.LAYER if layer in known else _Part.EFFECT
        sums = []
        # The stream moves on by one layer, also for layers whose effect is known.
        for number, batch in enumerate(batches):
            streams[number], of_rows = program(part, params, layer, streams[number], batch.arrays)
            sums.append(np.asarray(of_rows, np.float64))
        if layer in known:
            effects.append(known[layer])
            continue
        cosines, removed, doubled = _by_language(batches, sums)
        effect = LayerEffect(
            {language: value / tokens[language] for language, value in cosines.items()},
            _bits_per_byte(removed, texts),
            _bits_per_byte(doubled, texts),
        )
        found(layer, effect)
        effects.append(effect)

    nats = []
    for stream, batch in zip(streams, batches, strict=True):
        _, of_rows = program(_Part.LOSS, params, layers, stream, batch.arrays)
        nats.append(np.asarray(of_rows, np.float64))
    (whole,) = _by_language(batches, nats)
    return Sensitivity(
        _bits_per_byte(whole, texts),
        [effect.cosine for effect in effects],
        [effect.removed for effect in effects],
        [effect.doubled for effect in effects],
    )


def _batches(texts: Mapping[str, EncodedText], mesh: Mesh) -> list[_Batch]:
    """The windows of all languages in batches of one shape, with as little padding as possible."""
    windows: list[tuple[str, Window]] = []
    for language, text in texts.items():
        for batch in text.batches:
            for row in zip(*batch, strict=True):
                if row[1].any():
                    windows.append((language, row))
    # First the number of batches, then their rows: so the last batch is nearly full too.
    devices = rows_of_batch(1, 1, mesh, ROW_AXES)
    number = -(-len(windows) // (_ROWS_AT_ONCE * devices))
    rows = -(-len(windows) // number)
    rows += -rows % devices
    batches = []
    for start in range(0, len(windows), rows):
        some = windows[start : start + rows]
        padding = ((0, rows - len(some)), (0, 0))
        languages, some_rows = zip(*some, strict=True)
        arrays = [np.pad(np.stack(column), padding) for column in zip(*some_rows, strict=True)]
        batches.append(_Batch(tuple(arrays), [*languages, *[""] * (rows - len(some))]))
    return batches


def _by_language(batches: list[_Batch], sums: list[np.ndarray]) -> list[ByLanguage]:
    """Sums over the windows of each language, for each column of `sums` (rows by columns of each batch)."""
    columns: list[ByLanguage] = [{} for _ in range(sums[0].shape[1])]
    for batch, of_rows in zip(batches, sums, strict=True):
        for language, values in zip(batch.languages, of_rows, strict=True):
            if not language:
                continue
            for column, value in zip(columns, values, strict=True):
                column[language] = column.get(language, 0.0) + float(value)
    return columns


def _tokens(text: EncodedText) -> int:
    """The tokens of all windows, also those that count in no loss."""
    return sum(int(np.count_nonzero(batch[1])) for batch in text.batches)


def _bits_per_byte(nats: ByLanguage, texts: Mapping[str, EncodedText]) -> ByLanguage:
    if not all(np.isfinite(value) for value in nats.values()):
        raise BadInput(NOT_FINITE)
    bits = {}
    for language, value in nats.items():
        bits[language] = value / float(np.log(2)) / texts[language].bytes
    return bits


class _Part(enum.Enum):
    """The parts of the computation; each is a program."""

    EMBED = "embed"
    LAYER = "layer"
    EFFECT = "effect"
    LOSS = "loss"


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    mesh: Mesh,
    config: ModelConfig,
    compute_dtype: np.dtype,
    part: _Part,
    params: PyTree[Array],
    layer: Int[Array, ""],
    stream: Float[Array, "batch time embed"] | None,
    window: tuple[Int[Array, "batch time"], ...],
) -> tuple[Float[Array, "batch time embed"], Float[Array, "batch sums"]]:
    """The residual stream after a part, and sums over each row: for EFFECT cosines of all tokens, nats
    without the layer and with it applied twice; for LOSS nats; else nothing.
    """
    parallel = parallelism_on(mesh, whole_windows=True)
    execution = Execution(compute_dtype, parallel=parallel)

    def of_own_windows(
        params: PyTree[Array], layer: Array, stream: Array | None, window: tuple[Array, ...]
    ) -> tuple[Array, Array]:
        tokens, segment_ids = window[:2]
        if stream is None:
            return embedded(config, params, tokens, execution), jnp.zeros((len(tokens), 0))
        if part is _Part.LOSS:
            return stream, _nats(config, params, stream, window, parallel)[:, None]
        # Without the layer, the later layers read `stream`; with the layer twice, they read `again`.
        after = run_layers(config, params, layer, layer + 1, stream, segment_ids, execution)
        if part is _Part.LAYER:
            return after, jnp.zeros((len(tokens), 0))
        cosines = jnp.where(segment_ids > 0, _cosine(stream, after), 0.0)
        again = run_layers(config, params, layer, layer + 1, after, segment_ids, execution)

        # Both ways on, in one batch.
        twice = tuple(jnp.concatenate([column, column]) for column in window)
        both = run_layers(
            config, params, layer + 1, jnp.int32(config.num_hidden_layers),
            jnp.concatenate([stream, again]), twice[1], execution,
        )  # fmt: skip
        removed, doubled = jnp.split(_nats(config, params, both, twice, parallel), 2)
        return after, jnp.stack([jnp.sum(cosines, axis=1), removed, doubled], axis=1)

    # The number of the layer is traced, so that one program serves all layers.
    arguments = (params, layer, stream, window)
    if parallel.is_single_device:
        return of_own_windows(*arguments)
    rows, same = PartitionSpec(ROW_AXES), PartitionSpec()
    in_specs = (param_specs(config), same, None if stream is None else rows, (rows,) * len(window))
    return jax.shard_map(
        of_own_windows, mesh=mesh, in_specs=in_specs, out_specs=(rows, rows), check_vma=False
    )(*arguments)


def _nats(
    config: ModelConfig,
    params: PyTree[Array],
    stream: Float[Array, "batch time embed"],
    window: tuple[Array, ...],
    parallel: Parallelism,
) -> Float[Array, "batch"]:
    """The nats of the predicted tokens of each row, from the residual stream after the last layer."""
    tokens, segment_ids, *mask = window
    hidden = normed(config, params, stream)
    rows, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
    picked, log_z = target_logits(
        rows, output_table(config, params), targets, config.final_logit_softcapping, parallel
    )
    counts = target_mask(segment_ids, mask[0] if mask else None)
    return jnp.sum(jnp.where(counts, (log_z - picked).reshape(counts.shape), 0.0), axis=1)


def _cosine(
    one: Float[Array, "batch time embed"], other: Float[Array, "batch time embed"]
) -> Float[Array, "batch time"]:
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    lengths = jnp.linalg.norm(one, axis=-1) * jnp.linalg.norm(other, axis=-1)
    cosines: Array = jnp.sum(one * other, -1) / (lengths + 1e-30)
    return cosines


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
    """Markdown: a row for each layer. The changes are of bits per byte against the whole model, in percent:
    the mean over the languages, and each language where there are few.
    """
    columns = _columns(result)
    heads = ["cosine"]
    for name in ("removed", "doubled"):
        heads += [f"{name}, {column}" for column in columns]
    lines = ["| layer | " + " | ".join(heads) + " |", "| ---: |" + " ---: |" * len(heads)]
    for layer in range(len(result.cosine)):
        cells = [f"{_mean(result.cosine[layer]):.3f}"]
        for values in (result.removed, result.doubled):
            cells += [f"{_change(result, values[layer], column):+.1f}%" for column in columns]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _columns(result: Sensitivity) -> list[str]:
    """The languages and groups of the table: a wide table would be hard to read, so many languages are shown
    by their classes.
    """
    languages = list(result.model)
    if len(languages) == 1:
        return languages
    if len(languages) <= LANGUAGES_IN_TABLE:
        return ["all", *languages]
    means = class_means(result.model)
    return ["all", *(group for group in ("high", "low") if means[group] is not None)]


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
                style,
                color=INK,
                marker=".",
                label=label,
            )
            for name, color, values in (
                ("removed", BAD, result.removed),
                ("doubled", SERIES[3], result.doubled),
            ):
                change = [_change(result, by_language, group) for by_language in values]
                changes.plot(layers, change, style, color=color, marker=".", label=f"{name}, {label}")
        cosines.set_ylabel("cosine of the stream before and after")
        cosines.set_title("Similarity of each layer's input and output")
        # Some layers cost a thousand times as much as others, and some changes are below zero.
        changes.set_yscale("symlog", linthresh=1)
        changes.set_ylabel("change of bits per byte, %")
        changes.set_xlabel("layer")
        changes.set_title("Loss with a layer removed, and with it passed twice")
        for axes in (cosines, changes):
            axes.legend(ncols=2)


def _mean(by_language: ByLanguage, group: str = "all") -> float:
    """The mean over a group of languages, or the value of one language."""
    if group in by_language:
        return by_language[group]
    return class_mean(by_language, group)


def _change(result: Sensitivity, by_language: ByLanguage, group: str) -> float:
    return 100 * (_mean(by_language, group) / _mean(result.model, group) - 1)
