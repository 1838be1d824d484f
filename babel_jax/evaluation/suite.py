"""The offline suite: small tasks in the form of well-known benchmarks, made from the held-out text of a run.

    continuation  which of four sentences continues a passage; by log-likelihood per byte (as XCOPA, M3Exam)
    cloze         which of four words fills a gap; by log-likelihood of the sentence (as XNLI)
    to_english    a sentence after one example of its translation, greedy decoding; chrF++ (as Flores-200)
    from_english  the same from English

Rows with the same id in two languages are translations of each other. A suite of a few passages shows that
the path from text to table works, and it shows large differences; it cannot rank models.
"""

import itertools
import random
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
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.evaluation.bits_per_byte import LONGEST_WINDOW
from babel_jax.evaluation.items import Items, accuracy, chrf_plus_plus
from babel_jax.evaluation.prefix_trees import Scored
from babel_jax.evaluation.scoring import score
from babel_jax.inference.generation import generate
from babel_jax.languages import LANGUAGES
from babel_jax.scripts import sentence_end

_CONTINUATION, _CLOZE, _TO_ENGLISH, _FROM_ENGLISH = "continuation", "cloze", "to_english", "from_english"
CHOICE_TASKS, TRANSLATION_TASKS = (_CONTINUATION, _CLOZE), (_TO_ENGLISH, _FROM_ENGLISH)
_CHOICES = 4
CHANCE = dict.fromkeys(CHOICE_TASKS, 100 / _CHOICES)
# {task: {language: {"score", "stderr", "n"}}}, for bits per byte also "bytes"
Results = dict[str, dict[str, dict[str, Any]]]

# Text of equal sentences, or of one endless sentence, gives no question. After this many attempts without a
# question, the text is given up.
_FRUITLESS, _LONGEST_SENTENCE = 200, 2_000

_ENGLISH = "en"
_NEW_TOKENS = 48
SUITE_ROWS, SUITE_BATCH_TOKENS = 32, 4096


class Choice(NamedTuple):
    """A question: texts that begin with `context`; the first is the correct one.

    by_byte: divide the log-likelihoods by the lengths in bytes.
    """

    task: str
    language: str
    context: str
    options: tuple[str, ...]
    by_byte: bool


class Translation(NamedTuple):
    """A sentence to translate: the prompt, and a reference translation."""

    task: str
    language: str
    prompt: str
    reference: str


def choices(texts: Mapping[str, Sequence[Row]], items: int) -> list[Choice]:
    """At most `items` questions of each task and language.

    Languages whose passages have the same number of sentences get continuations of the same sentences. A
    cloze asks for a long word of its own language.
    """
    questions: list[Choice] = []
    for language, rows in texts.items():
        passages = [(row.id, sentences(row.text, language)) for row in rows]
        questions += itertools.islice(_continuations(language, passages), items)
        questions += itertools.islice(_clozes(language, passages), items)
    return questions


def translations(texts: Mapping[str, Sequence[Row]], items: int) -> list[Translation]:
    """Sentences to translate from each language into English, and from English: half of `items` in each
    direction, because they cost more.
    """
    tasks: list[Translation] = []
    english = {row.id: row.text for row in texts.get(_ENGLISH, ())}
    for language, rows in texts.items():
        # Only texts with the same ids are translations of each other.
        if language == _ENGLISH or not english or {row.id for row in rows} != english.keys():
            continue
        pairs: list[tuple[str, str]] = []
        for row in rows:
            pairs += _aligned(row.text, language, english[row.id])
        if len(pairs) < 2:
            continue

        names = LANGUAGES[language].name, LANGUAGES[_ENGLISH].name
        for number, pair in enumerate(pairs[: (items + 1) // 2]):
            # The example is the pair before (for the first pair, the last).
            example = pairs[number - 1]
            for task, source, target in ((_TO_ENGLISH, 0, 1), (_FROM_ENGLISH, 1, 0)):
                shown = f"{names[source]}: {example[source]}\n{names[target]}: {example[target]}\n"
                prompt = f"{shown}{names[source]}: {pair[source]}\n{names[target]}:"
                tasks.append(Translation(task, language, prompt, pair[target]))
    return tasks


def run_suite(
    config: ModelConfig,
    params: PyTree[Array],
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[Row]],
    items: int,
    mesh: Mesh,
    compute_dtype: DTypeLike = jnp.float32,
    translate: bool = True,
) -> dict[str, dict[str, list[Items]]]:
    """At most `items` scored items of each task and language; a language without items of a task is left out
    of it. Accuracies are percentages; chrF++ is from 0 to 100. translate: with the tasks of translation.
    """
    measured = _answered(config, params, tokenizer, choices(texts, items), mesh, compute_dtype)
    if translate:
        asked = translations(texts, items)
        measured |= _translated(config, params, tokenizer, asked, mesh, compute_dtype)
    # In the order of the tables, whichever languages have items of which tasks.
    return {task: measured[task] for task in (*CHOICE_TASKS, *TRANSLATION_TASKS) if task in measured}


def _answered(
    config: ModelConfig,
    params: PyTree[Array],
    tokenizer: Tokenizer,
    choices: Sequence[Choice],
    mesh: Mesh,
    compute_dtype: DTypeLike,
) -> dict[str, dict[str, list[Items]]]:
    """The accuracy of each task and language of questions."""
    questions: list[Choice] = []
    sequences: list[Scored] = []
    for question in choices:
        options = [_scored(tokenizer, question, option, config) for option in question.options]
        # An option of a single token has no preceding token, so it has no likelihood.
        if all(len(option.tokens) for option in options):
            questions.append(question)
            sequences += options

    # A question is answered correctly if its first option is the likeliest.
    likelihoods = iter(score(config, params, sequences, mesh, SUITE_BATCH_TOKENS, compute_dtype))
    answers: dict[str, dict[str, list[float]]] = {}
    for question in questions:
        values = []
        for option in question.options:
            length = len(option[len(question.context) :].encode()) if question.by_byte else 1
            values.append(next(likelihoods)[0] / length)
        of_task = answers.setdefault(question.task, {})
        of_task.setdefault(question.language, []).append(float(values[0] > max(values[1:])))
    measured: dict[str, dict[str, list[Items]]] = {}
    for task, by_language in answers.items():
        measured[task] = {language: [accuracy(right)] for language, right in by_language.items()}
    return measured


def _translated(
    config: ModelConfig,
    params: PyTree[Array],
    tokenizer: Tokenizer,
    asked: Sequence[Translation],
    mesh: Mesh,
    compute_dtype: DTypeLike,
) -> dict[str, dict[str, list[Items]]]:
    """chrF++ of each task and language of translations."""
    pairs: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    prompts = [item.prompt for item in asked]
    outputs = _continued(config, params, tokenizer, prompts, mesh, compute_dtype)
    for item, text in zip(asked, outputs, strict=True):
        hypotheses, references = pairs.setdefault((item.task, item.language), ([], []))
        # The model writes on after the translation, as the prompt does: another pair of lines.
        hypotheses.append(text.split("\n")[0].strip())
        references.append(item.reference)
    measured: dict[str, dict[str, list[Items]]] = {}
    for (task, language), (hypotheses, references) in pairs.items():
        measured.setdefault(task, {})[language] = [chrf_plus_plus(references, hypotheses)]
    return measured


def sentences(text: str, language: str) -> list[str]:
    """The sentences of a passage. In a script without marks at their ends (Thai), the pieces between
    spaces.
    """
    split = [part for part in sentence_end(LANGUAGES[language].script).split(text) if part.strip()]
    return split if len(split) > 1 else text.split()


def words(text: str, language: str) -> list[tuple[int, int]]:
    """The spans (start, end) of the words of a text; in scripts without spaces, of pairs of characters with
    their marks.
    """
    spans, start = [], None
    for index, character in enumerate([*text, " "]):
        inside = unicodedata.category(character)[0] in "LMN"
        if inside and start is None:
            start = index
        elif not inside and start is not None:
            spans.append((start, index))
            start = None
    if LANGUAGES[language].writing.characters_a_word is None:
        return spans

    pairs = []
    for first, last in spans:
        # A mark belongs to the character before it.
        edges = [index for index in range(first, last) if unicodedata.category(text[index])[0] != "M"]
        pairs += list(itertools.pairwise([*edges, last][::2]))
    return pairs


def _continuations(language: str, passages: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Choice]:
    """Questions of `continuation`: first after one sentence of each passage, then after two, and so on."""
    space = LANGUAGES[language].writing.space
    pool = []
    for identifier, passage in passages:
        for index, sentence in enumerate(passage):
            pool.append((identifier, index, sentence))
    fruitless = 0
    for cut in range(1, max((len(passage) for _, passage in passages), default=0)):
        for identifier, passage in passages:
            if cut >= len(passage):
                continue

            # Wrong options are no sentences of the context, which the model has read, and no copies of them
            # or of the correct one.
            known = set(passage[: cut + 1])
            others = []
            for of_passage, index, sentence in pool:
                is_later = of_passage != identifier or index > cut
                if is_later and sentence not in known:
                    others.append(sentence)
            if len(others) < _CHOICES - 1:
                fruitless += 1
                if fruitless == _FRUITLESS:
                    return
                continue

            # Seeded by passage and cut, so that every model gets the same options.
            wrong = random.Random(f"{identifier} {cut}").sample(others, _CHOICES - 1)
            context = space.join(passage[:cut])
            options = tuple(context + space + sentence for sentence in (passage[cut], *wrong))
            fruitless = 0
            yield Choice(_CONTINUATION, language, context, options, by_byte=True)


def _clozes(language: str, passages: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Choice]:
    """Questions of `cloze`: the longest word of each sentence, and other words of about its length."""
    all_sentences = list(itertools.chain.from_iterable(passage for _, passage in passages))
    vocabulary: dict[str, None] = {}  # a dict keeps the order
    for sentence in all_sentences:
        for start, stop in words(sentence, language):
            vocabulary[sentence[start:stop]] = None
    fruitless = 0
    for number, sentence in enumerate(all_sentences):
        if fruitless == _FRUITLESS:
            return
        fruitless += 1
        if len(sentence) > _LONGEST_SENTENCE:
            continue
        # Not the first word: it has no context.
        spans = words(sentence, language)[1:]
        if not spans:
            continue
        # Seeded by the sentence: the questions are the same for all models and in every process.
        draws = random.Random(f"{number}")
        start, stop = max(spans, key=lambda span: (span[1] - span[0], draws.random()))

        # Words as long as the correct one, because a shorter sentence is likelier.
        correct = sentence[start:stop]
        others = [word for word in vocabulary if word not in sentence]
        others.sort(key=lambda word: (_bytes_apart(word, correct), draws.random()))
        if len(others) < _CHOICES - 1:
            continue
        chosen = (correct, *others[: _CHOICES - 1])
        options = tuple(sentence[:start] + word + sentence[stop:] for word in chosen)
        fruitless = 0
        yield Choice(_CLOZE, language, "", options, by_byte=False)


def _bytes_apart(left: str, right: str) -> int:
    return abs(len(left.encode()) - len(right.encode()))


def _aligned(text: str, language: str, english: str) -> list[tuple[str, str]]:
    """Sentences with their translations; the whole passages if the numbers of sentences differ."""
    text_sentences, english_sentences = sentences(text, language), sentences(english, _ENGLISH)
    if len(text_sentences) != len(english_sentences):
        return [(text, english)]
    return list(zip(text_sentences, english_sentences, strict=True))


def suite_tokens(config: ModelConfig) -> tuple[int, int]:
    """The most tokens that are read of a text, and that are generated after a prompt."""
    longest = min(LONGEST_WINDOW, config.max_position_embeddings)
    return longest, min(_NEW_TOKENS, longest // 2)


def _scored(tokenizer: Tokenizer, question: Choice, option: str, config: ModelConfig) -> Scored:
    """The sequence of an option: the tokens after the context are scored; tokens beyond `suite_tokens` are
    dropped on the left.
    """
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
    """The text that the model generates after each prompt, greedily."""
    longest, new = suite_tokens(config)
    begin = tokenizer.begin_ids
    # A prompt that is too long loses its beginning: the sentence to translate is at the end.
    room = longest - new - len(begin)
    encoded = [[*begin, *ids[-room:]] for ids in tokenizer.encode_batch(prompts)]
    for start in range(0, len(encoded), SUITE_ROWS):
        # Every batch has the same number of rows, so that one program is compiled.
        batch = encoded[start : start + SUITE_ROWS]
        full = batch + batch[-1:] * (SUITE_ROWS - len(batch))
        written = generate(
            config, params, full, new, tokenizer.stop_ids, compute_dtype=compute_dtype, mesh=mesh
        )
        for prompt, ids in zip(batch, written, strict=False):
            yield continuation(tokenizer, prompt, ids)


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens after a prompt, without the token that ends generation."""
    return tokenizer.decode_after(prompt, [token for token in new if token not in tokenizer.stop_ids])
