"""A larger vocabulary: tokens learned on top of a tokenizer for chosen languages."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from babel_jax.config import Marks, Shares, VocabularySettings
from babel_jax.data.tokens.tokenizer_json import loaded_tokenizer
from babel_jax.errors import BadInput
from babel_jax.vocabulary.changes import figures_of
from babel_jax.vocabulary.characters import NewCharacter, new_characters
from babel_jax.vocabulary.editable import Kind, Vocabulary
from babel_jax.vocabulary.extended_files import extended_description, extended_model
from babel_jax.vocabulary.marks import joined, splits_marks
from babel_jax.vocabulary.merges import Learned, Limits, NewToken, Word, learn
from babel_jax.vocabulary.reach import unreachable
from babel_jax.vocabulary.words import Words, count_words

MOST_TOKEN_CHARACTERS = 32  # of a new token; longer ones are lines of signs, or whole sentences
# llama.cpp's converter knows a pre-tokenizer by the ids of this text alone (get_vocab_base_pre in its
# conversion/base.py). Pairs of tokens in it are never merged, so an extended tokenizer is known too. With
# joined marks the converter would take the old pattern and give other ids without a word: one pair of the
# text is merged then, so that the converter stops and says that it does not know the pre-tokenizer.
LLAMA_CPP_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)


@dataclasses.dataclass(frozen=True)
class NewRow:
    """A row of the embedding that is new: its id, its token's text as the vocabulary has it, the old tokens
    that it stands for, and the language that asked for it. The language is empty for an old token that no
    text gave before marks were joined to words.
    """

    id: int
    text: str
    parts: tuple[int, ...]
    language: str


@dataclasses.dataclass(frozen=True)
class Extension:
    """An extended tokenizer.

    description, model: the content of its tokenizer.json and tokenizer.model (None without one). merges:
    those that were added. size: the highest id + 1. figures: what changed, for people and --json.
    """

    settings: VocabularySettings
    description: dict[str, Any]
    model: bytes | None
    rows: tuple[NewRow, ...]
    merges: tuple[tuple[str, str], ...]
    size: int
    figures: dict[str, Any]


def extend_vocabulary(
    vocabulary: Vocabulary, texts: Mapping[str, Sequence[str]], settings: VocabularySettings
) -> Extension:
    """Learns new tokens for `settings.languages`. texts: of these languages and of the protected ones.

    Raises BadInput if the text does not support so many tokens, if the vocabulary has holes that are not to
    be reused, or if marks are to be joined in a tokenizer that does not split them.
    """
    _check(vocabulary, settings)
    old, old_words = vocabulary, count_words(vocabulary.splitter, texts)
    words = old_words
    # Other words, so the text is counted a second time. `old_words` stay for the figures.
    if settings.marks is Marks.JOIN:
        vocabulary = dataclasses.replace(vocabulary, description=joined(vocabulary.description))
        words = count_words(vocabulary.splitter, texts)

    # Without their texts, the tokens that are replaced are no parts of new ones.
    reused = _reusable_ids(vocabulary, words) if settings.reuse_unused else ()
    kept = list(vocabulary.texts)
    for number in reused:
        kept[number] = ""
    base = dataclasses.replace(vocabulary, texts=kept)

    # Characters first: merges are learned on top of them.
    characters = new_characters(base, words, settings)
    known = [*kept, *(character.text for character in characters)]
    learned = _learned(base, words, known, len(characters), settings)
    tokens: list[NewToken | NewCharacter] = [*characters, *learned.tokens]
    if len(tokens) < settings.tokens:
        raise BadInput(_too_many(len(tokens), settings))

    # Learned ids are numbers of `known`; in the files a new token has the id that `final` gives: first the
    # reused ids, then those after the last one.
    new_ids = [*reused[: len(tokens)]]
    new_ids += range(len(kept), len(kept) + len(tokens) - len(new_ids))
    final = [*range(len(kept)), *new_ids]
    new = {token.text: number for token, number in zip(tokens, new_ids, strict=True)}
    names = [*known, *(token.text for token in learned.tokens)]
    merges = tuple((names[left], names[right]) for left, right, _ in learned.merges)
    description = extended_description(base, new, merges, learned)
    model = extended_model(base, new, description) if base.model is not None else None

    # The extended vocabulary itself, to measure what it changes.
    after_texts = [*kept, *[""] * (max([*final, -1]) + 1 - len(kept))]
    for text, number in new.items():
        after_texts[number] = text
    after = dataclasses.replace(base, description=description, model=model, texts=after_texts)
    rows = _rows(old, len(kept), tokens, final, settings)
    if settings.marks is Marks.JOIN:
        rows += _revived(old, after, old_words, words)
    figures = figures_of(old, after, old_words, words, rows)
    return Extension(settings, description, model, tuple(rows), merges, len(after_texts), figures)


def _reusable_ids(vocabulary: Vocabulary, words: Words) -> tuple[int, ...]:
    """Ids without a token, and ids of tokens that no text gives; ascending."""
    holes = {number for number, text in enumerate(vocabulary.texts) if not text}
    dead = unreachable(vocabulary, _used_ids(vocabulary, words)).dead
    return tuple(sorted(holes.union(dead)))


def _check(vocabulary: Vocabulary, settings: VocabularySettings) -> None:
    path = vocabulary.tokenizer.path
    holes = [number for number, text in enumerate(vocabulary.texts) if not text]
    if holes and not settings.reuse_unused:
        raise BadInput(
            f"{path}: no token has the id {holes[0]} ({len(holes):,} ids below {len(vocabulary.texts):,} "
            "have none); add --reuse-unused, which gives them to new tokens"
        )
    if settings.marks is Marks.JOIN and not splits_marks(vocabulary.description):
        raise BadInput(
            f"{path}: the tokenizer does not split words at combining marks; leave out --marks join"
        )


def _used_ids(vocabulary: Vocabulary, words: Words) -> Counter[int]:
    """How often each id occurs in the words of all languages."""
    found: Counter[int] = Counter()
    for counts in words.counts.values():
        for word, count in counts.items():
            for number in vocabulary.tokens_of(word):
                found[number] += count
    return found


def _learned(
    base: Vocabulary, words: Words, known: Sequence[str], used_up: int, settings: VocabularySettings
) -> Learned:
    """Merges for the words of the vocabulary `base` with new characters, which are at the end of `known`.

    used_up: how many of the tokens that are asked for are characters.
    """
    is_unknown = settings.marks is Marks.JOIN
    weights, quotas = _quotas(words, settings, max(0, settings.tokens - used_up - is_unknown))
    protected_group = len(settings.languages)

    # A word of several languages is one word with a count for each group.
    collected: dict[str, dict[int, int]] = {}
    for language, counts in words.counts.items():
        group, weight = weights.get(language, (protected_group, 1.0))
        for word, count in counts.items():
            groups = collected.setdefault(word, {})
            groups[group] = groups.get(group, 0) + max(1, round(count * weight))

    tokens_of = _with_characters(base, known[len(base.texts) :])
    # Pairs of llama.cpp's text must never be merged: see LLAMA_CPP_TEXT.
    forbidden: dict[tuple[int, int], None] = {}
    for word in base.splitter(LLAMA_CPP_TEXT):
        forbidden |= dict.fromkeys(itertools.pairwise(tokens_of(word)))
    split = [Word(tokens_of(word), counts) for word, counts in sorted(collected.items())]
    limits = Limits(
        quotas,
        settings.least,
        lambda text: _is_allowed(base, text),
        protected_group,
        settings.tolerance,
        frozenset(forbidden),
        by_text=base.kind is not Kind.BYTES,
    )
    learned = learn(split, known, limits)
    return _with_unknown(base, learned, known, list(forbidden)) if is_unknown else learned


def _with_unknown(
    base: Vocabulary, learned: Learned, known: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> Learned:
    """With one more token, of a pair of LLAMA_CPP_TEXT outside ASCII."""
    taken = {*known, *(token.text for token in learned.tokens)}
    for left, right in pairs:
        text = known[left] + known[right]
        if text not in taken and not base.bytes_of(text).isascii() and _is_allowed(base, text):
            number = len(known) + len(learned.tokens)
            token = NewToken(text, (left, right), 0, 0)
            return Learned([*learned.tokens, token], [*learned.merges, (left, right, number)])
    return learned


def _quotas(
    words: Words, settings: VocabularySettings, tokens: int
) -> tuple[dict[str, tuple[int, float]], dict[int, int]]:
    """The group and the weight of each language, and the quota of each group."""
    count = len(settings.languages)
    weights: dict[str, tuple[int, float]] = {}
    # Equal shares: each language is a group with its own quota.
    quotas: dict[int, int] = {}
    if settings.shares is Shares.EQUAL:
        # The first languages get the tokens that are left over.
        for group, language in enumerate(settings.languages):
            weights[language] = (group, 1.0)
            quotas[group] = tokens // count + (group < tokens % count)
        return weights, quotas
    # One group, in which each language's text has the weight of the largest.
    most = max(words.bytes[language] for language in settings.languages)
    for language in settings.languages:
        weights[language] = (0, most / max(1, words.bytes[language]))
    return weights, {0: tokens}


def _with_characters(base: Vocabulary, characters: Sequence[str]) -> Callable[[str], list[int]]:
    """`tokens_of` of the vocabulary with new characters, whose ids follow the last one."""
    if not characters:
        return base.tokens_of
    numbers = {text: len(base.texts) + number for number, text in enumerate(characters)}
    description = extended_description(base, numbers, (), Learned((), ()))
    library = loaded_tokenizer(description | {"added_tokens": []}, base.tokenizer.path)
    return lambda word: [token.id for token in library.model.tokenize(word)]


def _is_allowed(base: Vocabulary, text: str) -> bool:
    """Whether a text may be a token: whole characters, or the first bytes of one; and not an added token."""
    if text in base.added:
        return False
    if base.kind is not Kind.BYTES:
        return len(text) <= MOST_TOKEN_CHARACTERS
    try:
        return len(base.bytes_of(text).decode()) <= MOST_TOKEN_CHARACTERS
    except UnicodeDecodeError as error:
        # Only the beginning of one character: its end is not there yet.
        return error.start == 0 and error.reason == "unexpected end of data"


def _rows(
    old: Vocabulary,
    existing: int,
    tokens: Sequence[NewToken | NewCharacter],
    final: Sequence[int],
    settings: VocabularySettings,
) -> list[NewRow]:
    """The new rows, with the old tokens that each one stands for."""
    # A new token may be made of new ones; the rows of old ones alone are trained.
    parts: dict[int, tuple[int, ...]] = {}
    rows = []
    for number, token in enumerate(tokens, start=existing):
        if isinstance(token, NewToken):
            left, right = (parts.get(part, (part,)) for part in token.parts)
            parts[number] = left + right
        else:
            parts[number] = tuple(old.tokens_of(token.text))
        language = settings.languages[token.group] if settings.shares is Shares.EQUAL else ""
        rows.append(NewRow(final[number], token.text, parts[number], language))
    return rows


def _revived(old: Vocabulary, after: Vocabulary, old_words: Words, words: Words) -> list[NewRow]:
    """Rows of old tokens that no text gave while marks ended words, and that text gives now.

    The model never read them, so they begin as new ones do. Qwen's vocabulary has over a thousand.
    """
    now, before = _used_ids(after, words), _used_ids(old, old_words)
    dead = set(unreachable(old, before).by_splitting)
    rows = []
    for number in sorted(set(now) & dead):
        text = old.texts[number]
        if after.texts[number] == text:
            plain = old.bytes_of(text).decode()
            rows.append(NewRow(number, text, tuple(old.library.encode(plain).ids), ""))
    return rows


def _too_many(supported: int, settings: VocabularySettings) -> str:
    return (
        f"--tokens {settings.tokens:,}: the text of {', '.join(settings.languages)} supports {supported:,} "
        f"new tokens that occur at least {settings.least} times; give fewer tokens, more text, or a lower "
        "--least"
    )
