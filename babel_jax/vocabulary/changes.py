"""The effect of an extension: tokens per byte, and the fraction of words whose tokens stay the same."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from babel_jax.vocabulary.editable import Vocabulary
from babel_jax.vocabulary.words import Words

if TYPE_CHECKING:
    from babel_jax.vocabulary.extension import NewRow


def figures_of(
    old: Vocabulary, after: Vocabulary, old_words: Words, words: Words, rows: Sequence["NewRow"]
) -> dict[str, Any]:
    """The figures of `babel tokenizer extend --json`.

    old_words, words: the same text split as the tokenizer did before, and as it does now. unchanged_words:
    the fraction of a language's words that have the same tokens. not_in_text: new tokens that occur only as
    parts of longer ones. unreachable: new tokens that no text gives; 0 unless something is wrong.
    """
    languages: dict[str, dict[str, float]] = {}
    seen: set[int] = set()
    for language, counts in words.counts.items():
        before = 0
        for word, count in old_words.counts[language].items():
            before += len(old.tokens_of(word)) * count
        tokens = unchanged = 0
        for word, count in counts.items():
            # A word is unchanged if the new tokenizer still writes it in its old tokens.
            ids = after.tokens_of(word)
            tokens += len(ids) * count
            unchanged += count * (ids == old.tokens_of(word))
            seen.update(ids)
        # Bytes are the same before and after, while the number of words is not if marks are joined to them.
        size = max(1, words.bytes[language])
        languages[language] = {
            "tokens_per_byte_before": before / size,
            "tokens_per_byte_after": tokens / size,
            "unchanged_words": unchanged / max(1, sum(counts.values())),
        }
    unseen = [row for row in rows if row.id not in seen]
    # A token that does not occur in this text must at least be the only token of its own text.
    lost = [row for row in unseen if after.tokens_of(row.text) != [row.id]]
    reused = revived = 0
    for row in rows:
        if row.id < len(old.texts):
            # An old id has its old token again, or a new token in place of an unused one.
            is_same_token = old.texts[row.id] == row.text
            revived += is_same_token
            reused += not is_same_token
    return {
        "kind": str(old.kind),
        "tokens": len(rows),
        "tokens_by_language": dict(Counter(row.language for row in rows if row.language)),
        "reused_ids": reused,
        "revived": revived,
        "not_in_text": len(unseen),
        "unreachable": len(lost),
        "languages": languages,
    }
