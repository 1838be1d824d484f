"""Our decoder as a model of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

The harness makes prompts and metrics; what it asks of a model (log-likelihoods of continuations and of whole
texts, greedy continuations up to stop strings) is computed here, with the tokens that its own Hugging Face
backend would use.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from babel_jax.config import ModelConfig
from babel_jax.data.tokens.prompts import PromptTokenizer
from babel_jax.errors import BadInput
from babel_jax.evaluation.benchmarks.prompt_shapes import alike_prompts
from babel_jax.evaluation.benchmarks.responses import Responses
from babel_jax.evaluation.prefix_trees import Scored
from babel_jax.evaluation.scoring import Score, on_mesh, rows_of_batch, score
from babel_jax.inference.generation import SMALLEST_BUCKET, bucket, extend, padded_left, prefill, until_first
from babel_jax.model.parallel import ROW_AXES

# prompts continued together: a step reads all weights, for however few of them. For them a batch may be as
# much larger:
ROWS = 16
LARGER = 8  # times
STEPS = 32  # new tokens between two looks for stop strings
Request = tuple[Any, list[int], list[int]]


class DecoderLM(TemplateLM):
    """A decoder for `lm_eval.evaluator`.

    `truncated` counts the requests that were answered with their beginning cut, since they exceed the model's
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
        """`params` lie on `mesh`.

        A batch has about `batch_tokens` tokens, or as `LARGER` says where texts are generated.
        """
        super().__init__()
        self.config, self.params, self.tokens = config, params, tokenizer
        self.responses, self.mesh, self.batch_tokens, self.compute_dtype = (
            responses,
            mesh,
            batch_tokens,
            np.dtype(compute_dtype),
        )
        self.truncated = 0

    # --- what the harness asks about the tokenizer ---------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without context follows."""
        return self.tokens.first_id

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's caches of prompts."""
        return str(self.tokens.folder).replace("/", "__")

    @property
    def max_length(self) -> int:
        """Most tokens of context that the model reads."""
        return self.config.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a prompt; a text that begins with the token that begins texts gets no second one."""
        return self.tokens.encode(string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The folder's template."""
        return self.tokens.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation. Raises BadInput where the model has no chat template."""
        return self.tokens.chat(chat_history, add_generation_prompt)

    # --- log-likelihoods -----------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """For each (context, continuation): log p(continuation | context), and whether it is what greedy
        decoding gives.
        """
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
        """log p of whole texts; those longer than the model's positions in windows with as much context as
        there can be.
        """
        windows, keys = [], []
        for request in self._unanswered("loglikelihood_rolling", requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            own = [(None, *make_disjoint_window(window)) for window in rolling]
            key = self.responses.key("loglikelihood_rolling", request.args)
            if not own:
                self.responses.add({key: 0.0})
            windows += own
            keys += [key] * len(own)
        self._scores(windows, keys, "scoring texts", lambda parts: sum(log_p for log_p, _ in parts))
        return self._answers("loglikelihood_rolling", requests)

    def _scores(
        self, requests: Sequence[Request], keys: Sequence[str], what: str, answer: Any
    ) -> list[Score]:
        """Scores all; of those that share a key, `answer` makes one response when the last is there."""
        sequences = [
            self._within_positions(key, *request[1:]) for key, request in zip(keys, requests, strict=True)
        ]
        waiting: dict[str, dict[int, Score | None]] = defaultdict(dict)
        for number, key in enumerate(keys):
            waiting[key][number] = None

        def done(scores: dict[int, Score]) -> None:
            for number, found in scores.items():
                waiting[keys[number]][number] = found
            complete = {keys[number] for number in scores if None not in waiting[keys[number]].values()}
            self.responses.add({key: answer(list(waiting[key].values())) for key in complete})

        return score(
            self.config, self.params, sequences, self.mesh, self.batch_tokens, self.compute_dtype, done, what
        )

    def _within_positions(self, key: str, context: list[int], continuation: list[int]) -> Scored:
        if not continuation:
            raise BadInput("a choice adds no token to its context; correct or remove the item")
        whole = np.array(context + continuation, np.int32)
        if len(whole) - 1 > self.max_length:
            self.responses.cut.add(key)
        kept = whole[-(self.max_length + 1) :]
        return Scored(kept[:-1], kept[1:][-len(continuation) :])

    # --- generation ----------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): the greedy continuation up to the first stop string, or to the most
        tokens it may have.
        """
        todo = [(request, *self._limits(request)) for request in self._unanswered("generate_until", requests)]
        prompts = [self._prompt(request, most) for request, _, most in todo]
        new_size = bucket(max((most for _, _, most in todo), default=1), SMALLEST_BUCKET)
        with tqdm(
            total=len(todo), desc="generating", unit=" requests", leave=False, disable=None
        ) as progress:
            devices = rows_of_batch(1, 1, self.mesh, ROW_AXES)
            for shared, length, groups in alike_prompts(prompts, max(ROWS, devices), new_size, devices):
                tokens = shared + length + new_size
                wanted = min(ROWS * tokens, LARGER * self.batch_tokens)
                most = rows_of_batch(tokens, max(self.batch_tokens, wanted), self.mesh, ROW_AXES)
                size = _rows_of_each([len(group) for group in groups], most, devices)
                for batch in (
                    group[start : start + size] for group in groups for start in range(0, len(group), size)
                ):
                    texts = self._generated(
                        [prompts[number] for number in batch],
                        [todo[number][1:] for number in batch],
                        shared,
                        size,
                        length,
                        new_size,
                    )
                    keys = [self.responses.key("generate_until", todo[number][0].args) for number in batch]
                    self.responses.add(dict(zip(keys, texts, strict=True)))
                    progress.update(len(batch))
        return self._answers("generate_until", requests)

    def _limits(self, request: Instance) -> tuple[list[str], int]:
        """Stop strings and the most new tokens."""
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
        return [
            *([until] if isinstance(until, str) else until),
            self.tokens.decode([self.eot_token_id], skip_special=False),
        ], most

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
        prefix, mesh = np.array(prompts[0][:shared], np.int32), self.mesh
        columns = padded_left([own[shared:] for own in prompts], size, length)
        tokens, padding = (on_mesh(mesh, column, ROW_AXES) for column in columns)
        rows = np.int32(len(prompts))
        state = prefill(
            self.config, new_size, self.compute_dtype, self.params, prefix, tokens, padding, rows, mesh=mesh
        )
        eos, step, texts, finished = (
            np.array(self.tokens.end_ids, np.int32),
            0,
            [""] * len(prompts),
            np.arange(size) >= len(prompts),
        )
        while step < max(most for _, most in limits) and not finished.all():
            until_step = np.int32(min(step + STEPS, new_size))
            state = state._replace(finished=on_mesh(mesh, finished, ()))
            state = extend(
                self.config, self.compute_dtype, self.params, state, padding, until_step, eos, None, mesh=mesh
            )
            step, new = int(state.step), np.asarray(state.tokens)[: len(prompts)]
            finished = np.asarray(state.finished).copy()
            for row, (until, most) in enumerate(limits):
                ids = until_first(new[row, : min(step, most)].tolist(), self.tokens.end_ids)
                texts[row], stopped = _stopped(self.tokens.decode_after(prompts[row], ids), until)
                finished[row] |= stopped or step >= most
        return texts

    # --- answers that are there already --------------------------------------------------------------------

    def _unanswered(self, kind: str, requests: Iterable[Instance]) -> list[Instance]:
        """The requests without a response, each once."""
        by_key = {self.responses.key(kind, request.args): request for request in requests}
        return [request for key, request in by_key.items() if key not in self.responses]

    def _answers(self, kind: str, requests: Iterable[Instance]) -> list[Any]:
        keys = [self.responses.key(kind, request.args) for request in requests]
        self.truncated += sum(key in self.responses.cut for key in keys)
        return [self.responses[key] for key in keys]


def _rows_of_each(groups: Sequence[int], most: int, devices: int) -> int:
    """Rows of batches of one size, `most` at the most, for groups of so many prompts: with few batches, and
    few rows that are empty.
    """
    sizes = {devices * -(-prompts // (devices * -(-prompts // most))) for prompts in groups}
    return min(sizes, key=lambda size: (size + ROWS) * sum(-(-prompts // size) for prompts in groups))


def _stopped(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop strings, and whether there is one."""
    before = functools.reduce(lambda text, stop: text.split(stop)[0] if stop else text, until, text)
    return before, len(before) < len(text)
