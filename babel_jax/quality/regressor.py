"""A decoder with a linear map from the last state of a document to its scores, trained and run on packed
windows.

Documents are packed whole, each ended by the tokenizer's eos, where its scores are read. Scores are parts of
the judge's scale, 0 to 1.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree
from tqdm import tqdm

from babel_jax.config import ModelConfig, OptimizerRule, OptimizerSettings
from babel_jax.config.quality import ClassifierSettings
from babel_jax.data.tokens.tokenizers import Tokenizer
from babel_jax.data.windows.packing import best_fit
from babel_jax.model.decoder import hidden_states
from babel_jax.model.execution import Execution
from babel_jax.training.mesh import (
    batch_sharding,
    check_batch,
    everywhere,
    global_batch,
    make_mesh,
    param_shardings,
    replicated,
)
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
    """What scoring took."""

    documents: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of documents, without padding; compiling counts."""
        return self.tokens / self.seconds


def pack_documents(texts: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> Windows:
    """The documents as the tokenizer begins them, cut to `seq_len` - 1 tokens, each with eos after it."""
    encoded = [
        [*[*tokenizer.begin_ids, *ids][: seq_len - 1], tokenizer.eos_id]
        for ids in tokenizer.encode_batch(texts)
    ]
    placed = best_fit([len(ids) for ids in encoded], seq_len)
    tokens, segment_ids = (
        np.full((len(placed), seq_len), tokenizer.eos_id, np.int32),
        np.zeros((len(placed), seq_len), np.int32),
    )
    window, end = np.zeros(len(encoded), np.int64), np.zeros(len(encoded), np.int64)
    for place, documents in enumerate(placed):
        start = 0
        for segment, document in enumerate(documents, 1):
            stop = start + len(encoded[document])
            tokens[place, start:stop], segment_ids[place, start:stop] = encoded[document], segment
            window[document], end[document] = place, stop - 1
            start = stop
    return Windows(tokens, segment_ids, window, end)


def with_head(params: PyTree[Array], hidden_size: int, dimensions: int) -> PyTree[Array]:
    """The parameters of a decoder, without its output projection, with a head of zeros: every score is then
    the middle of the scale.
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
    compute_dtype: str,
) -> Float[Array, "batch time dimensions"]:
    """The scores of what has been read up to each position, float32.

    The decoder must have tied embeddings.
    """
    decoder = {"model": params["model"]}
    hidden = hidden_states(
        config, decoder, tokens, segment_ids=segment_ids, execution=Execution(jnp.dtype(compute_dtype))
    )
    return hidden.astype(jnp.float32) @ params[HEAD]["weight"].T + params[HEAD]["bias"]


class Regressor:
    """A classifier at work on the devices of this process, which share the windows of a batch."""

    def __init__(
        self, config: ModelConfig, params: PyTree[Array], tokenizer: Tokenizer, settings: ClassifierSettings
    ):
        """`params` are as `with_head` gives them; their arrays are taken over.

        Raises BadInput where a batch cannot be shared.
        """
        self.config, self._tokenizer, self._settings = config, tokenizer, settings
        self._mesh = make_mesh({"data": -1})
        check_batch(self._mesh, settings.batch_size, 1, settings.seq_len)
        self._shardings = _shardings(config, self._mesh)
        self.params = jax.device_put(params, self._shardings)
        compute_dtype = str(settings.compute_dtype)
        self._predict = jax.jit(
            lambda params, tokens, segment_ids: predict(config, params, tokens, segment_ids, compute_dtype),
            in_shardings=(self._shardings, batch_sharding(self._mesh), batch_sharding(self._mesh)),
            out_shardings=batch_sharding(self._mesh),
        )

    def train(
        self, texts: Sequence[str], scores: Float[np.ndarray, "documents dimensions"], seed: int
    ) -> list[float]:
        """Learns the scores of texts; gives the loss (mean squared error at the documents' ends) of every
        step.
        """
        settings, windows = self._settings, pack_documents(texts, self._tokenizer, self._settings.seq_len)
        targets = np.full((*windows.tokens.shape, scores.shape[1]), np.nan, np.float32)
        targets[windows.window, windows.end] = scores
        count = len(windows.tokens)
        steps = max(1, math.ceil(settings.epochs * count / settings.batch_size))
        rules = (
            OptimizerRule(pattern="(norm|bias)"),
            OptimizerRule(pattern=f"^{HEAD}/", rate=10.0),
            OptimizerRule(pattern=".", weight_decay=settings.weight_decay),
        )
        optimizer = AdamW(OptimizerSettings(rules=rules), self.params)
        abstract_moments = optimizer.shardings(self.params, self._shardings, replicated(self._mesh))
        moments = jax.jit(optimizer.init, out_shardings=abstract_moments)(self.params)
        step = jax.jit(
            self._step(optimizer),
            donate_argnums=(0, 1),
            in_shardings=(
                self._shardings,
                abstract_moments,
                batch_sharding(self._mesh),
                replicated(self._mesh),
            ),
            out_shardings=(self._shardings, abstract_moments, replicated(self._mesh)),
        )
        losses: list[Array | float] = []
        order = _order(count, seed)
        for now in tqdm(range(steps), "train", unit=" steps", disable=None):
            chosen = np.fromiter(itertools.islice(order, settings.batch_size), np.int64)
            fields = {
                "tokens": windows.tokens[chosen],
                "segment_ids": windows.segment_ids[chosen],
                "targets": targets[chosen],
            }
            rate = everywhere(np.float32(learning_rate(settings.schedule, now, steps)), self._mesh)
            self.params, moments, loss = step(self.params, moments, global_batch(fields, self._mesh), rate)
            # Taken one step late: the devices need not wait for the host, nor does it run far ahead of them.
            losses[-1:] = [float(before) for before in losses[-1:]]
            losses.append(loss)
        return [float(loss) for loss in losses]

    def score(self, texts: Iterable[str]) -> Iterator[tuple[Float[np.ndarray, "block dimensions"], Speed]]:
        """The scores of texts in their order, a block of some thousand at a time, with
        what each block took.
        """
        texts, batch = iter(texts), self._settings.batch_size
        while block := list(itertools.islice(texts, _BLOCK_DOCUMENTS)):
            start = time.perf_counter()
            windows = pack_documents(block, self._tokenizer, self._settings.seq_len)
            padding = ((0, -len(windows.tokens) % batch), (0, 0))
            tokens, segment_ids = np.pad(windows.tokens, padding), np.pad(windows.segment_ids, padding)
            found = []
            for first in range(0, len(tokens), batch):
                fields = {
                    "tokens": tokens[first : first + batch],
                    "segment_ids": segment_ids[first : first + batch],
                }
                found.append(self._predict(self.params, *global_batch(fields, self._mesh).values()))
            # Taken from the devices once all is under way, so that they need not wait.
            scores = np.concatenate([np.asarray(values) for values in found])[windows.window, windows.end]
            yield scores, Speed(len(block), int((windows.segment_ids > 0).sum()), time.perf_counter() - start)

    def _step(self, optimizer: AdamW):  # type: ignore[no-untyped-def]
        config, compute_dtype = self.config, str(self._settings.compute_dtype)

        def step(
            params: PyTree[Array], moments: PyTree[Array], batch: dict[str, Array], rate: Float[Array, ""]
        ) -> tuple[PyTree[Array], PyTree[Array], Float[Array, ""]]:
            def loss_of(params: PyTree[Array]) -> Float[Array, ""]:
                scores = predict(config, params, batch["tokens"], batch["segment_ids"], compute_dtype)
                known = jnp.isfinite(batch["targets"])
                return jnp.sum(
                    jnp.where(known, scores - jnp.nan_to_num(batch["targets"]), 0.0) ** 2
                ) / jnp.maximum(jnp.sum(known), 1)

            loss, gradients = jax.value_and_grad(loss_of)(params)
            factor = jnp.minimum(1.0, optimizer.clip_norm / (optimizer.norm(gradients) + 1e-12))
            gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
            params, moments = optimizer.update(gradients, moments, params, rate)
            return params, moments, loss

        return step


def _shardings(config: ModelConfig, mesh: Mesh) -> PyTree:
    head = {"weight": replicated(mesh), "bias": replicated(mesh)}
    return {"model": param_shardings(config, mesh)["model"], HEAD: head}


def _order(count: int, seed: int) -> Iterator[int]:
    """All windows in a random order, then all again in another, without end."""
    for epoch in itertools.count():
        yield from np.random.default_rng((seed, epoch)).permutation(count).tolist()
