"""A decoder with a linear map from the last state of a document to its scores, trained and run on packed
windows.

Documents are packed whole. The tokenizer's eos ends each, and its scores are read there. Scores are fractions
of the judge's scale, 0 to 1.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from babel_jax.config import ModelConfig, OptimizerRule, OptimizerSettings
from babel_jax.config.quality import ClassifierSettings
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.windows.packing import best_fit
from babel_jax.errors import BadInput
from babel_jax.evaluation.scoring import on_mesh, rows_of_batch
from babel_jax.model.decoder import describe, hidden_states
from babel_jax.model.execution import Execution
from babel_jax.model.parallel import ROW_AXES, SINGLE_DEVICE, Parallelism
from babel_jax.model.parameters import Parameter
from babel_jax.model.sharding import parallelism_on, param_specs
from babel_jax.progress import Work
from babel_jax.training.mesh import everywhere, mesh_for, param_shardings, replicated
from babel_jax.training.optimizer import AdamW, learning_rate

HEAD = "head"
_BLOCK_DOCUMENTS = 4096


@dataclasses.dataclass(frozen=True)
class Windows:
    """Documents packed in windows; document d ends in window `window[d]` at position `end[d]`."""

    tokens: Int[np.ndarray, "windows time"]
    segment_ids: Int[np.ndarray, "windows time"]
    window: Int[np.ndarray, "documents"]
    end: Int[np.ndarray, "documents"]


@dataclasses.dataclass(frozen=True)
class Speed:
    """The size and the time of a block of scoring."""

    documents: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of documents per second, without padding; compilation counts."""
        return self.tokens / self.seconds


def pack_documents(texts: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> Windows:
    """The documents, each with the tokenizer's begin tokens, cut to `seq_len` - 1 tokens, and followed by
    eos.
    """
    encoded = []
    for ids in tokenizer.encode_batch(texts):
        begun = [*tokenizer.begin_ids, *ids]
        encoded.append([*begun[: seq_len - 1], tokenizer.eos_id])

    # Documents side by side, each a segment; the score of a document is read at its eos.
    windows = best_fit([len(ids) for ids in encoded], seq_len)
    tokens = np.full((len(windows), seq_len), tokenizer.eos_id, np.int32)
    segment_ids = np.zeros((len(windows), seq_len), np.int32)
    window, end = np.zeros(len(encoded), np.int64), np.zeros(len(encoded), np.int64)
    for row, documents in enumerate(windows):
        start = 0
        for segment, document in enumerate(documents, 1):
            stop = start + len(encoded[document])
            tokens[row, start:stop], segment_ids[row, start:stop] = encoded[document], segment
            window[document], end[document] = row, stop - 1
            start = stop
    return Windows(tokens, segment_ids, window, end)


def with_head(params: PyTree[Array], hidden_size: int, dimensions: int) -> PyTree[Array]:
    """The parameters of a decoder without its output projection, and a head whose scores are all the middle
    of the scale.
    """
    head = {
        "weight": jnp.zeros((dimensions, hidden_size), jnp.float32),
        "bias": jnp.full(dimensions, 0.5, jnp.float32),
    }
    return {"model": params["model"], HEAD: head}


def predict(
    config: ModelConfig,
    params: PyTree[Array],
    tokens: Int[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    compute_dtype: DTypeLike,
    parallel: Parallelism = SINGLE_DEVICE,
) -> Float[Array, "batch time dimensions"]:
    """The scores at each position, of the text up to it; float32.

    The decoder must have tied embeddings. With `parallel`, under `shard_map`: the scores of this device's
    rows, which are whole; layers are gathered one at a time.
    """
    decoder = {"model": params["model"]}
    hidden = hidden_states(
        config,
        decoder,
        tokens,
        segment_ids=segment_ids,
        execution=Execution(jnp.dtype(compute_dtype), parallel=parallel),
    )
    result: Float[Array, "batch time dimensions"] = (
        hidden.astype(jnp.float32) @ params[HEAD]["weight"].T + params[HEAD]["bias"]
    )
    return result


class Regressor:
    """A classifier on a mesh, by default of all devices: parameters are sharded as in training, and each
    device has its rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: PyTree[Array],
        tokenizer: Tokenizer,
        settings: ClassifierSettings,
        mesh: Mesh | None = None,
    ):
        """params: the output of `with_head`; its arrays are donated."""
        self.config, self._tokenizer, self._settings = config, tokenizer, settings
        self._mesh = mesh_for(config) if mesh is None else mesh
        # The rows of a batch are a multiple of the devices; empty rows fill it up.
        devices = rows_of_batch(1, 1, self._mesh, ROW_AXES)
        self._rows = -(-settings.batch_size // devices) * devices
        self._shardings = {
            "model": param_shardings(config, self._mesh)["model"],
            HEAD: dict.fromkeys(("weight", "bias"), replicated(self._mesh)),
        }
        self.params = jax.device_put(params, self._shardings)

    def train(
        self, texts: Sequence[str], scores: Float[np.ndarray, "documents dimensions"], seed: int
    ) -> list[float]:
        """Learns the scores of texts; returns the loss (mean squared error at the documents' ends) of every
        step. Raises BadInput if the last loss is not finite.
        """
        settings, windows = self._settings, pack_documents(texts, self._tokenizer, self._settings.seq_len)
        # NaN everywhere but at the ends of documents.
        targets = np.full((*windows.tokens.shape, scores.shape[1]), np.nan, np.float32)
        targets[windows.window, windows.end] = scores
        count = len(windows.tokens)
        steps = max(1, math.ceil(settings.epochs * count / settings.batch_size))
        # Norms and biases have no weight decay. The head's weights start from zero, and learn ten times as
        # fast.
        rules = (
            OptimizerRule(pattern="(norm|bias)"),
            OptimizerRule(pattern=f"^{HEAD}/", rate=10.0),
            OptimizerRule(pattern=".", weight_decay=settings.weight_decay),
        )
        optimizer = AdamW(OptimizerSettings(rules=rules), self.params)
        abstract_moments = optimizer.shardings(self.params, self._shardings, replicated(self._mesh))
        moments = jax.jit(optimizer.init, out_shardings=abstract_moments)(self.params)
        # Parameters and moments are donated: only one copy of them is on the devices.
        step = jax.jit(
            self._step(optimizer),
            donate_argnums=(0, 1),
            in_shardings=(
                self._shardings,
                abstract_moments,
                NamedSharding(self._mesh, PartitionSpec(ROW_AXES)),
                replicated(self._mesh),
            ),
            out_shardings=(self._shardings, abstract_moments, replicated(self._mesh)),
        )
        losses: list[Array | float] = []
        order = _order(count, seed)
        for step_number in Work("training the classifier", range(steps), unit="steps", keep=True):
            chosen = np.fromiter(itertools.islice(order, settings.batch_size), np.int64)
            batch = self._on_mesh(windows.tokens[chosen], windows.segment_ids[chosen], targets[chosen])
            rate = everywhere(np.float32(learning_rate(settings.schedule, step_number, steps)), self._mesh)
            self.params, moments, loss = step(self.params, moments, batch, rate)
            # A loss is read one step late, so that devices and host need not wait for each other, and the
            # host does not run far ahead.
            losses[-1:] = [float(previous) for previous in losses[-1:]]
            losses.append(loss)
        if not np.isfinite(losses[-1]):
            raise BadInput(
                f"the classifier's training diverged (its loss after {steps:,} steps is not finite); lower "
                "classifier.schedule.peak"
            )
        return [float(loss) for loss in losses]

    def score(self, texts: Iterable[str]) -> Iterator[tuple[Float[np.ndarray, "block dimensions"], Speed]]:
        """The scores of texts in order, some thousand at a time, with the size and time of each block."""
        texts, dtype = iter(texts), jnp.dtype(str(self._settings.compute_dtype))
        while block := list(itertools.islice(texts, _BLOCK_DOCUMENTS)):
            start = time.perf_counter()
            windows = pack_documents(block, self._tokenizer, self._settings.seq_len)
            on_devices = []
            for first in range(0, len(windows.tokens), self._rows):
                batch = slice(first, first + self._rows)
                rows = self._on_mesh(windows.tokens[batch], windows.segment_ids[batch])
                on_devices.append(_scores(self._mesh, self.config, dtype, self.params, *rows))

            # Copied to the host after all batches have been started, so that the devices need not wait.
            all_scores = np.concatenate([np.asarray(values) for values in on_devices])
            scores = all_scores[windows.window, windows.end]
            tokens = int((windows.segment_ids > 0).sum())
            yield scores, Speed(len(block), tokens, time.perf_counter() - start)

    def _on_mesh(self, *columns: np.ndarray) -> list[Array]:
        """The rows of a batch, filled up with empty ones, spread over the devices."""
        filled = []
        for rows in columns:
            missing = ((0, self._rows - len(rows)), *[(0, 0)] * (rows.ndim - 1))
            # A target that is NaN does not count.
            empty = np.nan if np.issubdtype(rows.dtype, np.floating) else 0
            filled.append(on_mesh(self._mesh, np.pad(rows, missing, constant_values=empty), ROW_AXES))
        return filled

    def _step(self, optimizer: AdamW):  # type: ignore[no-untyped-def]
        gradients_of = summed_gradients(self.config, str(self._settings.compute_dtype), self._mesh)

        def step(
            params: PyTree[Array], moments: PyTree[Array], batch: list[Array], rate: Float[Array, ""]
        ) -> tuple[PyTree[Array], PyTree[Array], Float[Array, ""]]:
            # As in the train step of a run: one factor makes means of sums, and clips.
            total, known, gradients = gradients_of(params, *batch)
            known = jnp.maximum(known, 1.0)
            norm = optimizer.norm(gradients) / known
            factor = jnp.minimum(1.0, optimizer.clip_norm / (norm + 1e-12)) / known
            gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
            params, moments = optimizer.update(gradients, moments, params, rate)
            return params, moments, total / known

        return step


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scores(
    mesh: Mesh,
    config: ModelConfig,
    compute_dtype: np.dtype,
    params: PyTree[Array],
    tokens: Int[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
) -> Float[Array, "batch time dimensions"]:
    parallel = parallelism_on(mesh, whole_windows=True)

    def of_own_rows(params: PyTree[Array], tokens: Array, segment_ids: Array) -> Array:
        return predict(config, params, tokens, segment_ids, compute_dtype, parallel)

    result: Float[Array, "batch time dimensions"] = _under_mesh(
        of_own_rows, mesh, config, 2, PartitionSpec(ROW_AXES)
    )(params, tokens, segment_ids)
    return result


def summed_gradients(config: ModelConfig, compute_dtype: DTypeLike, mesh: Mesh) -> Callable[..., Any]:
    """A function of parameters, tokens, segment ids and targets (NaN for none). It returns the squared
    errors, the number of targets, and the gradients of the errors, each summed over the batch.
    """
    parallel = parallelism_on(mesh, whole_windows=True)

    def of_own_rows(
        params: PyTree[Array], tokens: Array, segment_ids: Array, targets: Array
    ) -> tuple[Array, Array, PyTree[Array]]:
        # A document without a score in a dimension has no error there.
        known = jnp.isfinite(targets)

        def squared_errors(params: PyTree[Array]) -> Float[Array, ""]:
            scores = predict(config, params, tokens, segment_ids, compute_dtype, parallel)
            return jnp.sum(jnp.where(known, scores - jnp.nan_to_num(targets), 0.0) ** 2)

        def of_all(gradient: Array, parameter: Parameter) -> Array:
            return parallel.all_reduce_gradient(gradient, parameter.logical_axes)

        # Each device has the gradients of its own rows; the sums are over all devices.
        total, gradients = jax.value_and_grad(squared_errors)(params)
        model = jax.tree.map(of_all, gradients["model"], describe(config)["model"])
        head = jax.tree.map(lambda gradient: parallel.all_reduce(gradient, ROW_AXES), gradients[HEAD])
        sums = parallel.all_reduce(jnp.stack([total, jnp.sum(known).astype(jnp.float32)]), ROW_AXES)
        return sums[0], sums[1], {"model": model, HEAD: head}

    return _under_mesh(of_own_rows, mesh, config, 3, (PartitionSpec(), PartitionSpec(), _specs(config)))


def _under_mesh(
    of_own_rows: Callable[..., Any], mesh: Mesh, config: ModelConfig, columns: int, out_specs: Any
) -> Callable[..., Any]:
    """The function of parameters and `columns` of rows, as each device of a mesh runs it; the same function
    if there is one device.
    """
    if parallelism_on(mesh).is_single_device:
        return of_own_rows
    in_specs = (_specs(config), *[PartitionSpec(ROW_AXES)] * columns)
    return jax.shard_map(of_own_rows, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _specs(config: ModelConfig) -> PyTree[PartitionSpec]:
    return {
        "model": param_specs(config)["model"],
        HEAD: dict.fromkeys(("weight", "bias"), PartitionSpec()),
    }


def _order(count: int, seed: int) -> Iterator[int]:
    """All windows in a random order, then all again in another order, without end."""
    for epoch in itertools.count():
        yield from np.random.default_rng((seed, epoch)).permutation(count).tolist()
