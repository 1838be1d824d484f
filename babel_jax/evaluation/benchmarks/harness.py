"""Our decoder as a model of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

The harness makes prompts and metrics. The model's part is computed here: log-likelihoods of continuations and
of whole texts, and greedy continuations up to stop strings. The tokens are those of the harness's own Hugging
Face backend.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from babel_jax.config import ModelConfig
from babel_jax.data.tokens.prompts import PromptTokenizer
from babel_jax.errors import BadInput
from babel_jax.evaluation.benchmarks.prompt_shapes import alike_prompts
from babel_jax.evaluation.benchmarks.responses import Responses
from babel_jax.evaluation.prefix_trees import Scored
from babel_jax.evaluation.scoring import Score, on_mesh, rows_of_batch, score
from babel_jax.inference.decoding import extend, prefill
from babel_jax.inference.generation import SMALLEST_BUCKET, bucket, padded_left, until_first
from babel_jax.model.parallel import ROW_AXES
from babel_jax.progress import Work

# A decoding step reads all weights even for a single prompt, so at least ROWS prompts are decoded together.
# For them, a batch may have up to LARGER times as many tokens.
ROWS = 16
LARGER = 8
STEPS = 32  # new tokens between two searches for stop strings
Request = tuple[Any, list[int], list[int]]


class DecoderLM(TemplateLM):  # type: ignore[misc]
    """A decoder for `lm_eval.evaluator`.

    truncated: the number of requests whose beginning was cut, because they are longer than the model's
    positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: PyTree[Array],
        tokenizer: PromptTokenizer,
        responses: Responses,
        mesh: Mesh,
        batch_tokens: int,
        compute_dtype: DTypeLike,
    ):
        """`params` must be on `mesh`.

        A batch has about `batch_tokens` tokens; for generation up to `LARGER` times as many.
        """
        super().__init__()
        self.config, self.params, self.tokens = config, params, tokenizer
        self.responses, self.mesh, self.batch_tokens = responses, mesh, batch_tokens
        self.compute_dtype = np.dtype(compute_dtype)
        self.truncated = 0

    # --- The tokenizer's part of the harness's interface. --------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context."""
        return self.tokens.first_id

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's caches of prompts."""
        return str(self.tokens.folder).replace("/", "__")

    @property
    def max_length(self) -> int:
        """The most tokens of context that the model reads."""
        return self.config.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a prompt. A text that already begins with the begin token gets no second one."""
        return self.tokens.encode(string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The folder's template."""
        return self.tokens.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation. Raises BadInput if the model has no chat template."""
        return self.tokens.chat(chat_history, add_generation_prompt)

    # --- log-likelihoods -----------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """For each (context, continuation): log p(continuation | context), and True if greedy decoding gives
        the continuation.
        """
        # An empty choice has no token to score.
        for request in requests:
            if not request.args[1]:
                raise BadInput(
                    f"{request.task_name}: item {request.doc_id} has an empty choice; correct or remove it"
                )
        super().loglikelihood(self._unanswered("loglikelihood", requests), disable_tqdm=True)
        return [(log_p, greedy) for log_p, greedy in self._answers("loglikelihood", requests)]

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[Score]:
        keys = [self.responses.key("loglikelihood", strings) for strings, _, _ in requests]
        return self._scores(requests, keys, "scoring", lambda parts: parts[0])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts. Texts longer than the model's positions are scored in windows, each with as
        much context as possible.
        """
        # All windows of a text have its key: the text is answered when all are scored.
        windows, keys = [], []
        for request in self._unanswered("loglikelihood_rolling", requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            text_windows = [(None, *make_disjoint_window(window)) for window in rolling]
            key = self.responses.key("loglikelihood_rolling", request.args)
            if not text_windows:
                self.responses.add({key: 0.0})
            windows += text_windows
            keys += [key] * len(text_windows)
        self._scores(windows, keys, "scoring texts", lambda parts: sum(log_p for log_p, _ in parts))
        return self._answers("loglikelihood_rolling", requests)

    def _scores(
        self, requests: Sequence[Request], keys: Sequence[str], what: str, answer: Any
    ) -> list[Score]:
        """Scores all requests. `answer` turns the scores of requests with the same key into one response,
        once all are there.
        """
        sequences = []
        # The scores of each key by request number; None until they are there.
        waiting: dict[str, dict[int, Score | None]] = defaultdict(dict)
        for number, (key, request) in enumerate(zip(keys, requests, strict=True)):
            sequences.append(self._within_positions(key, *request[1:]))
            waiting[key][number] = None

        def done(scores: dict[int, Score]) -> None:
            for number, request_score in scores.items():
                waiting[keys[number]][number] = request_score
            # Kept at once: a stopped evaluation computes no answer twice.
            answers = {}
            for key in dict.fromkeys(keys[number] for number in scores):
                parts = list(waiting[key].values())
                if None not in parts:
                    answers[key] = answer(parts)
            self.responses.add(answers)

        return score(
            self.config, self.params, sequences, self.mesh, self.batch_tokens, self.compute_dtype, done, what
        )

    def _within_positions(self, key: str, context: list[int], continuation: list[int]) -> Scored:
        if not continuation:
            raise BadInput("a choice adds no token to its context; correct or remove the item")
        # As in the harness: the beginning of the context is cut, never the choice.
        whole = np.array(context + continuation, np.int32)
        if len(whole) - 1 > self.max_length:
            self.responses.cut.add(key)
        # The last token is only a target, so one token more than the model's positions fits.
        kept = whole[-(self.max_length + 1) :]
        return Scored(kept[:-1], kept[1:][-len(continuation) :])

    # --- generation ----------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): the greedy continuation up to the first stop string, or up to its
        most tokens.
        """
        unanswered = self._unanswered("generate_until", requests)
        limits = [self._limits(request) for request in unanswered]
        prompts = []
        for request, (_, most) in zip(unanswered, limits, strict=True):
            prompts.append(self._prompt(request, most))
        # One size for all batches, because it is part of the shape of each program.
        new_size = bucket(max((most for _, most in limits), default=1), SMALLEST_BUCKET)
        progress = Work[Any]("generating answers", total=len(prompts), unit="requests")
        with progress:
            devices = rows_of_batch(1, 1, self.mesh, ROW_AXES)
            for shared, length, groups in alike_prompts(prompts, max(ROWS, devices), new_size, devices):
                # The size of the batches of this shape, in rows.
                tokens = shared + length + new_size
                wanted = min(ROWS * tokens, LARGER * self.batch_tokens)
                most_rows = rows_of_batch(tokens, max(self.batch_tokens, wanted), self.mesh, ROW_AXES)
                size = _rows_of_each([len(group) for group in groups], most_rows, devices)

                for batch in _batches(groups, size):
                    texts = self._generated(
                        [prompts[number] for number in batch],
                        [limits[number] for number in batch],
                        shared,
                        size,
                        length,
                        new_size,
                    )
                    answers = {}
                    for number, text in zip(batch, texts, strict=True):
                        answers[self.responses.key("generate_until", unanswered[number].args)] = text
                    self.responses.add(answers)
                    progress.update(len(batch))
        return self._answers("generate_until", requests)

    def _limits(self, request: Instance) -> tuple[list[str], int]:
        """The stop strings and the most new tokens of a request."""
        # The harness's default number of new tokens.
        settings = normalize_gen_kwargs(request.args[1], 256)
        until, most = settings.get("until") or [], settings["max_gen_toks"]
        if settings.get("do_sample"):
            raise BadInput(
                f"{request.task_name}: draws at random (do_sample); only greedy generation is there"
            )
        if most >= self.max_length:
            raise BadInput(
                f"{request.task_name}: {most} new tokens leave no room for a prompt in the model's "
                f"{self.max_length} positions"
            )
        # The end token is a stop string too, as in the harness's own backend.
        stops = [until] if isinstance(until, str) else list(until)
        stops.append(self.tokens.decode([self.eot_token_id], skip_special=False))
        return stops, most

    def _prompt(self, request: Instance, most: int) -> list[int]:
        ids = self.tok_encode(request.args[0]) or [self.prefix_token_id]
        if len(ids) > self.max_length - most:
            self.responses.cut.add(self.responses.key("generate_until", request.args))
        return ids[-(self.max_length - most) :]

    def _generated(
        self,
        prompts: Sequence[list[int]],
        limits: Sequence[tuple[list[str], int]],
        shared: int,
        size: int,
        length: int,
        new_size: int,
    ) -> list[str]:
        """The texts of one batch of `size` rows, each with `shared` + `length` tokens and up to `new_size`
        new ones.
        """
        # The examples of few-shot prompts are the same in all of them, and are computed once.
        prefix, mesh = np.array(prompts[0][:shared], np.int32), self.mesh
        columns = padded_left([prompt[shared:] for prompt in prompts], size, length)
        tokens, padding = (on_mesh(mesh, column, ROW_AXES) for column in columns)
        rows = np.int32(len(prompts))
        state = prefill(
            self.config, new_size, self.compute_dtype, self.params, prefix, tokens, padding, rows, mesh=mesh
        )

        # Rows that fill up the batch count as finished from the start.
        eos, step, texts = np.array(self.tokens.end_ids, np.int32), 0, [""] * len(prompts)
        finished = np.arange(size) >= len(prompts)
        while step < max(most for _, most in limits) and not finished.all():
            # STEPS new tokens for all rows, then the host looks for stop strings and finished rows.
            until_step = np.int32(min(step + STEPS, new_size))
            state = state._replace(finished=on_mesh(mesh, finished, ()))
            state = extend(
                self.config, self.compute_dtype, self.params, state, padding, until_step, eos, None, mesh=mesh
            )
            step, new = int(state.step), np.asarray(state.tokens)[: len(prompts)]

            # Stop strings are searched for in the text, because they need not be tokens.
            finished = np.asarray(state.finished).copy()
            for row, (until, most) in enumerate(limits):
                ids = until_first(new[row, : min(step, most)].tolist(), self.tokens.end_ids)
                texts[row], stopped = _stopped(self.tokens.decode_after(prompts[row], ids), until)
                finished[row] |= stopped or step >= most
        return texts

    # --- Answers of an earlier, stopped evaluation. --------------------------------------------------------

    def _unanswered(self, kind: str, requests: Iterable[Instance]) -> list[Instance]:
        """The requests without a response, each once."""
        # Equal requests have equal answers, and one computation.
        by_key = {self.responses.key(kind, request.args): request for request in requests}
        return [request for key, request in by_key.items() if key not in self.responses]

    def _answers(self, kind: str, requests: Iterable[Instance]) -> list[Any]:
        keys = [self.responses.key(kind, request.args) for request in requests]
        self.truncated += sum(key in self.responses.cut for key in keys)
        return [self.responses[key] for key in keys]


def _batches(groups: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Each group in batches of at most `size`."""
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _rows_of_each(groups: Sequence[int], most: int, devices: int) -> int:
    """The rows of each batch, at most `most`, for groups of so many prompts. It is chosen for few batches and
    few empty rows.
    """
    # For each group, the smallest size that needs no further batch; all sizes are multiples of `devices`.
    sizes = set()
    for prompts in groups:
        batches = -(-prompts // most)
        sizes.add(devices * -(-prompts // (devices * batches)))

    # A step reads all weights once for each batch, which takes about as long as ROWS more rows.
    def cost(size: int) -> int:
        batches = sum(-(-prompts // size) for prompts in groups)
        return (size + ROWS) * batches

    return min(sizes, key=cost)


def _stopped(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and True if there is one."""
    before = functools.reduce(lambda text, stop: text.split(stop)[0] if stop else text, until, text)
    return before, len(before) < len(text)
