"""The offline suite: small tasks in the forms of the big benchmarks, made of the held-out text that every run
has.

continuation  which of four sentences goes on a passage; the likeliest by the byte (the form of XCOPA and
M3Exam) cloze         which of four words fills a gap; the likeliest sentence (the form of XNLI) to_english
a sentence after one example of its translation, greedily; chrF++ (the form of Flores-200) from_english  the
same the other way

Rows of one id are translations of each other where two languages hold out the same ids. A suite of a few
passages shows that the path from text to table works, and differences that are large; it does not rank
models.
"""

import itertools
import random
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from babel_jax.config import ModelConfig
from babel_jax.data.sources.rows import Row
from babel_jax.data.tokens.tokenizers import Tokenizer
from babel_jax.evaluation.bits_per_byte import LONGEST_WINDOW
from babel_jax.evaluation.items import chrf_plus_plus
from babel_jax.evaluation.prefix_trees import Scored
from babel_jax.evaluation.scoring import score
from babel_jax.inference.generation import generate
from babel_jax.languages import LANGUAGES

_CONTINUATION, _CLOZE, _TO_ENGLISH, _FROM_ENGLISH = "continuation", "cloze", "to_english", "from_english"
CHOICE_TASKS, TRANSLATION_TASKS = (_CONTINUATION, _CLOZE), (_TO_ENGLISH, _FROM_ENGLISH)
_CHOICES = 4
CHANCE = dict.fromkeys(CHOICE_TASKS, 100 / _CHOICES)
# {task: {language: {"score", "stderr", "n"}}}
Results = dict[str, dict[str, dict[str, Any]]]

# Text of equal sentences, or of one endless one, gives no questions: so many tries without one are enough.
_FRUITLESS, _LONGEST_SENTENCE = 200, 2_000

_ENGLISH = "en"
_NEW_TOKENS = 48
SUITE_ROWS, SUITE_BATCH_TOKENS = 32, 4096
_SENTENCE_END = re.compile(r"(?<=[.!?。！？।۔؟။])[\"'”’»」』)]*\s*")
_WITHOUT_SPACES = ("Hans", "Jpan", "Thai", "Mymr")


class Choice(NamedTuple):
    """A question: texts that begin with `context`, the first of them true.

    `by_byte` divides their log-likelihoods by their lengths.
    """

    task: str
    language: str
    context: str
    options: tuple[str, ...]
    by_byte: bool


class Translation(NamedTuple):
    """A sentence to be translated behind `prompt`, and how it is translated."""

    task: str
    language: str
    prompt: str
    reference: str


def choices(texts: Mapping[str, Sequence[Row]], items: int) -> list[Choice]:
    """At most `items` questions of each task and language.

    They are the same ones in languages whose passages have as many sentences.
    """
    found: list[Choice] = []
    for language, rows in texts.items():
        passages = [(row.id, sentences(row.text)) for row in rows]
        found += itertools.islice(_continuations(language, passages), items)
        found += itertools.islice(_clozes(language, passages), items)
    return found


def translations(texts: Mapping[str, Sequence[Row]], items: int) -> list[Translation]:
    """At most half as many sentences as `items` (they cost more) of each language other than English to
    English, and as many from it.
    """
    found: list[Translation] = []
    english = {row.id: row.text for row in texts.get(_ENGLISH, ())}
    for language, rows in texts.items():
        if language == _ENGLISH or not english or {row.id for row in rows} != english.keys():
            continue
        pairs = [pair for row in rows for pair in _aligned(row.text, english[row.id])]
        if len(pairs) < 2:
            continue
        names = LANGUAGES[language].name, LANGUAGES[_ENGLISH].name
        for number, pair in enumerate(pairs[: (items + 1) // 2]):
            example = pairs[number - 1]
            for task, source, target in ((_TO_ENGLISH, 0, 1), (_FROM_ENGLISH, 1, 0)):
                shown = f"{names[source]}: {example[source]}\n{names[target]}: {example[target]}\n"
                prompt = f"{shown}{names[source]}: {pair[source]}\n{names[target]}:"
                found.append(Translation(task, language, prompt, pair[target]))
    return found


def run_suite(
    config: ModelConfig,
    params: PyTree[Array],
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[Row]],
    items: int,
    mesh: Mesh,
    compute_dtype: DTypeLike = jnp.float32,
) -> Results:
    """Scores on at most `items` items of each task and language; a language without items of a task is left
    out of it.

    Accuracies are percentages, chrF++ goes from 0 to 100. `stderr` is that of a mean over items, None for one
    item and for chrF++.
    """
    results: Results = {}
    questions = choices(texts, items)
    scored = [
        [_scored(tokenizer, question, option, config) for option in question.options]
        for question in questions
    ]
    # An option of a single token has nothing before it that it could be likely behind.
    whole = [all(len(option.tokens) for option in options) for options in scored]
    questions = list(itertools.compress(questions, whole))
    sequences = [option for options in itertools.compress(scored, whole) for option in options]
    likelihoods = iter(score(config, params, sequences, mesh, SUITE_BATCH_TOKENS, compute_dtype))
    right: dict[tuple[str, str], list[float]] = {}
    for question in questions:
        lengths = [
            len(option[len(question.context) :].encode()) if question.by_byte else 1
            for option in question.options
        ]
        values = [next(likelihoods)[0] / length for length in lengths]
        right.setdefault((question.task, question.language), []).append(100.0 * (values[0] > max(values[1:])))
    for (task, language), hits in right.items():
        stderr = float(np.std(hits, ddof=1) / np.sqrt(len(hits))) if len(hits) > 1 else None
        results.setdefault(task, {})[language] = {
            "score": float(np.mean(hits)),
            "stderr": stderr,
            "n": len(hits),
        }

    written: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    asked = translations(texts, items)
    for item, text in zip(
        asked,
        _continued(config, params, tokenizer, [item.prompt for item in asked], mesh, compute_dtype),
        strict=True,
    ):
        hypotheses, references = written.setdefault((item.task, item.language), ([], []))
        hypotheses.append(text.split("\n")[0].strip())
        references.append(item.reference)
    for (task, language), (hypotheses, references) in written.items():
        chrf = chrf_plus_plus(references, hypotheses).score
        results.setdefault(task, {})[language] = {"score": chrf, "stderr": None, "n": len(hypotheses)}
    return {task: results[task] for task in (*CHOICE_TASKS, *TRANSLATION_TASKS) if task in results}


def sentences(text: str) -> list[str]:
    """The sentences of a passage; of a script without marks at their ends (Thai) what
    stands between spaces.
    """
    found = [part for part in _SENTENCE_END.split(text) if part.strip()]
    return found if len(found) > 1 else text.split()


def words(text: str, language: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end; in scripts without spaces, pairs of characters with their
    marks.
    """
    found, start = [], None
    for place, character in enumerate([*text, " "]):
        inside = unicodedata.category(character)[0] in "LMN"
        if inside and start is None:
            start = place
        elif not inside and start is not None:
            found.append((start, place))
            start = None
    if LANGUAGES[language].script not in _WITHOUT_SPACES:
        return found
    pairs = []
    for first, last in found:
        edges = [place for place in range(first, last) if unicodedata.category(text[place])[0] != "M"] + [
            last
        ]
        pairs += list(itertools.pairwise(edges[::2]))
    return pairs


def _continuations(language: str, passages: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Choice]:
    space = "" if LANGUAGES[language].script in ("Hans", "Jpan") else " "
    pool = [
        (identifier, place, sentence) for identifier, own in passages for place, sentence in enumerate(own)
    ]
    fruitless = 0
    for cut in range(1, max((len(own) for _, own in passages), default=0)):
        for identifier, own in passages:
            if cut >= len(own):
                continue
            # Not what stands before the gap, which the model has read, and not the same sentence from
            # elsewhere.
            others = [
                text
                for whose, place, text in pool
                if (whose, place) > (identifier, cut) or whose != identifier
            ]
            before = set(own[: cut + 1])
            others = [text for text in others if text not in before]
            if len(others) < _CHOICES - 1:
                fruitless += 1
                if fruitless == _FRUITLESS:
                    return
                continue
            wrong = random.Random(f"{identifier} {cut}").sample(others, _CHOICES - 1)
            context = space.join(own[:cut])
            fruitless = 0
            yield Choice(
                _CONTINUATION,
                language,
                context,
                tuple(context + space + text for text in (own[cut], *wrong)),
                by_byte=True,
            )


def _clozes(language: str, passages: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Choice]:
    every = [sentence for _, own in passages for sentence in own]
    vocabulary = list(
        dict.fromkeys(sentence[slice(*place)] for sentence in every for place in words(sentence, language))
    )
    fruitless = 0
    for number, sentence in enumerate(every):
        if fruitless == _FRUITLESS:
            return
        fruitless += 1
        if len(sentence) > _LONGEST_SENTENCE:
            continue
        places = words(sentence, language)[1:]
        if not places:
            continue
        chosen = random.Random(f"{number}")
        start, stop = max(places, key=lambda place: (place[1] - place[0], chosen.random()))
        # Words as long as the true one: a shorter sentence is likelier as such.
        right = sentence[start:stop]
        others = [word for word in vocabulary if word not in sentence]
        others.sort(key=lambda word: (_bytes_apart(word, right), chosen.random()))
        if len(others) < _CHOICES - 1:
            continue
        options = tuple(
            sentence[:start] + word + sentence[stop:] for word in (right, *others[: _CHOICES - 1])
        )
        fruitless = 0
        yield Choice(_CLOZE, language, "", options, by_byte=False)


def _bytes_apart(one: str, other: str) -> int:
    return abs(len(one.encode()) - len(other.encode()))


def _aligned(text: str, english: str) -> list[tuple[str, str]]:
    """Sentences beside their translations, or the whole passages where the numbers of sentences differ."""
    own, theirs = sentences(text), sentences(english)
    return list(zip(own, theirs, strict=True)) if len(own) == len(theirs) else [(text, english)]


def suite_tokens(config: ModelConfig) -> tuple[int, int]:
    """The most tokens that are read of a text, and that are written after a prompt."""
    longest = min(LONGEST_WINDOW, config.max_position_embeddings)
    return longest, min(_NEW_TOKENS, longest // 2)


def _scored(tokenizer: Tokenizer, question: Choice, option: str, config: ModelConfig) -> Scored:
    """The tokens behind the context are scored; what is more than `suite_tokens` is left out on the left."""
    longest, _ = suite_tokens(config)
    begin = tokenizer.begin_ids
    ids = np.asarray([*begin, *tokenizer.encode(option)], np.int32)
    context = max(1, len(begin) + len(tokenizer.encode(question.context)))
    targets = ids[max(1, min(context, len(ids) - 1)) :][-longest:]
    return Scored(ids[:-1][-longest:], targets)


def _continued(
    config: ModelConfig,
    params: PyTree[Array],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    mesh: Mesh,
    compute_dtype: DTypeLike,
) -> Iterator[str]:
    longest, new = suite_tokens(config)
    begin = tokenizer.begin_ids
    room = longest - new - len(begin)
    encoded = [[*begin, *ids[-room:]] for ids in tokenizer.encode_batch(prompts)]
    for start in range(0, len(encoded), SUITE_ROWS):
        batch = encoded[start : start + SUITE_ROWS]
        full = batch + batch[-1:] * (SUITE_ROWS - len(batch))
        written = generate(
            config, params, full, new, tokenizer.stop_ids, compute_dtype=compute_dtype, mesh=mesh
        )
        for prompt, ids in zip(batch, written, strict=False):
            yield continuation(tokenizer, prompt, ids)


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens after a prompt, without the token that ends it."""
    return tokenizer.decode_after(prompt, [token for token in new if token not in tokenizer.stop_ids])
