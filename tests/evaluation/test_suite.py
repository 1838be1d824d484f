"""The offline suite: its items against the text that they are made of, its scores against each item alone."""

import itertools
import math
import time
import unicodedata

import jax
import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.data.sources.rows import Row
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.evaluation.items import scores_of
from babel_jax.evaluation.suite import choices, run_suite, sentences, translations, words
from babel_jax.inference.generation import generate
from babel_jax.languages import BABEL
from babel_jax.model.decoder import forward, init_params
from babel_jax.training.mesh import make_mesh


@pytest.fixture(scope="module")
def passages():
    return {code: rows[6:9] for code, rows in embedded_corpus().items()}


def test_the_first_option_stands_in_the_passage_and_the_others_do_not_follow(passages):
    asked = choices(passages, 4)
    for language in BABEL:
        text = [" ".join(row.text.split()) for row in passages[language]]
        for task in ("continuation", "cloze"):
            own = [question for question in asked if (question.task, question.language) == (task, language)]
            assert len(own) == 4
            for question in own:
                assert len(set(question.options)) == 4
                assert all(option.startswith(question.context) for option in question.options)
                assert any(question.options[0] in passage for passage in text)
                assert not any(option in passage for option in question.options[1:] for passage in text)


def test_parallel_passages_give_the_same_questions(passages):
    asked = choices(passages, 4)

    def places(language):
        own = [sentence for row in passages[language] for sentence in sentences(row.text, language)]
        found = [
            question for question in asked if (question.task, question.language) == ("continuation", language)
        ]
        return [
            [own.index(option[len(question.context) :].strip()) for option in question.options]
            for question in found
        ]

    same = [code for code in BABEL if code != "th"]  # which has no marks between sentences
    assert all(places(code) == places("en") for code in same)


def test_translations_are_of_the_same_sentence_with_another_as_example(passages):
    asked = translations(passages, 4)
    assert len(asked) == 24 * 2 * 2
    english, swahili = (sentences(passages[code][0].text, code) for code in ("en", "sw"))
    to_english = next(item for item in asked if (item.task, item.language) == ("to_english", "sw"))
    last = sentences(passages["en"][-1].text, "en")[-1], sentences(passages["sw"][-1].text, "sw")[-1]
    assert to_english.reference == english[0]
    assert to_english.prompt == f"Swahili: {last[1]}\nEnglish: {last[0]}\nSwahili: {swahili[0]}\nEnglish:"
    assert all(item.reference not in item.prompt for item in asked)


def test_only_the_same_ids_are_translations(passages):
    other = [Row(f"other-{row.id}", row.text, row.kind) for row in passages["sw"]]
    asked = translations(
        {"en": passages["en"], "sw": other, "ha": passages["ha"][:2], "fr": passages["fr"]}, 4
    )
    assert {item.language for item in asked} == {"fr"}
    assert translations({"sw": passages["sw"], "fr": passages["fr"]}, 4) == []


@given(st.sampled_from(BABEL), st.text(max_size=60))
def test_words_stand_in_order_and_are_cut_before_no_mark(language, text):
    places = words(text, language)
    assert all(start < stop for start, stop in places)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(places))
    for start, stop in places:
        assert all(unicodedata.category(character)[0] in "LMN" for character in text[start:stop])
        if start and unicodedata.category(text[start])[0] == "M":
            assert unicodedata.category(text[start - 1])[0] not in "LMN"


@pytest.mark.parametrize("code", BABEL)
def test_every_language_has_words_and_sentences(passages, code):
    for row in passages[code]:
        assert len(sentences(row.text, code)) >= 3
        assert len(words(row.text, code)) >= 10


def test_scores_are_those_of_each_item_alone(tiny_config, passages, small_model):
    tokenizer = open_tokenizer(small_model)
    config = tiny_config.model_copy(
        update={
            "vocab_size": 1280,
            "initializer_range": 0.2,
            "num_hidden_layers": 2,
            "max_position_embeddings": 1024,
        }
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(1))
    texts = {code: passages[code] for code in ("en", "sw", "th")}
    found = scores_of(run_suite(config, params, tokenizer, texts, 3, make_mesh({})))
    assert list(found) == ["continuation", "cloze", "to_english", "from_english"]
    asked = scores_of(run_suite(config, params, tokenizer, texts, 3, make_mesh({}), translate=False))
    assert asked == {task: found[task] for task in ("continuation", "cloze")}

    run = jax.jit(forward, static_argnums=0)

    def log_p(text, context):
        ids, skipped = tokenizer.encode(text), max(1, len(tokenizer.encode(context)))
        # Of few lengths, since each is compiled.
        padded = np.zeros((1, math.ceil(len(ids) / 256) * 256), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(run(config, params, padded)[0], np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(logits[place - 1, ids[place]] for place in range(skipped, len(ids)))

    hits = {}
    for question in choices(texts, 3):
        values = [log_p(option, question.context) for option in question.options]
        if question.task == "continuation":
            lengths = [len(option.removeprefix(question.context).encode()) for option in question.options]
            values = [value / length for value, length in zip(values, lengths, strict=True)]
        hits.setdefault((question.task, question.language), []).append(100 * (int(np.argmax(values)) == 0))
    for (task, language), own in hits.items():
        expected = {
            "score": pytest.approx(np.mean(own)),
            "stderr": pytest.approx(np.std(own) / np.sqrt(len(own) - 1), rel=0.1),
            "n": 3,
        }
        assert found[task][language] == expected
    assert len({tuple(own) for own in hits.values()}) > 1

    for task in ("to_english", "from_english"):
        for language in ("sw", "th"):
            asked = [
                item for item in translations(texts, 3) if (item.task, item.language) == (task, language)
            ]
            written = []
            for item in asked:
                (ids,) = generate(config, params, [tokenizer.encode(item.prompt)], 48, [tokenizer.eos_id])
                written.append(
                    tokenizer.decode(
                        [token for token in ids if token < tokenizer.vocab_size and token != tokenizer.eos_id]
                    )
                    .split("\n")[0]
                    .strip()
                )
            expected = sacrebleu.corpus_chrf(
                written, [[item.reference for item in asked]], word_order=2
            ).score
            score = found[task][language]
            assert (score["score"], score["n"]) == (pytest.approx(expected), 2)


def test_text_too_short_for_a_question_is_left_out(passages):
    assert choices({"sw": [Row("a", "Moja.", "web")]}, 4) == []
    assert choices({"sw": []}, 4) == []


def test_a_question_with_an_option_of_one_token_is_left_out(tiny_config, tiny_params, passages):
    class Words:
        """What stands between spaces is a token, so that a Chinese sentence is a single one."""

        vocab_size, eos_id, begin_ids, stop_ids = 512, 0, (), (0,)

        def encode(self, text):
            return [1 + sum(word.encode()) % 500 for word in text.split()]

        def encode_batch(self, texts):
            return [self.encode(text) for text in texts]

    texts = {code: passages[code] for code in ("sw", "zh")}
    assert {question.language for question in choices(texts, 2) if question.task == "cloze"} == {"sw", "zh"}
    assert run_suite(tiny_config, tiny_params, Words(), texts, 2, make_mesh({}))["cloze"].keys() == {"sw"}


@pytest.mark.parametrize(
    "text",
    [
        "The cat sat. " * 3000,
        "A b c. D e f. G h i. " * 1500,
        " ".join(f"w{number}" for number in range(40_000)) + ". End.",
    ],
)
def test_the_time_of_making_questions_is_bounded(text):
    """Of equal sentences it was cubic in their number, and of one long sentence quadratic in its words."""
    start = time.process_time()
    choices({"en": [Row("a", text, "web")]}, 8)
    assert time.process_time() - start < 3.0
