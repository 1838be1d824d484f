"""The language of a text among the 25: py3langid (Lui and Baldwin 2012; Barbaresi), with its classes
restricted to the 25.
"""

import functools

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from babel_jax.languages import CODES

# The accuracy is 98.5% on lines of 110 characters and 99.2% on whole documents (docs/log.md). The time grows
# with the length, so pieces of a long document are read: several, because one may be a list of names or code.
_PIECES, _PIECE_BYTES = 3, 250


@functools.cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(CODES)
    return identifier


def language_probabilities(text: str) -> dict[str, float]:
    """The probability of each of the 25 languages, likeliest first. Of a long text, pieces from its
    beginning, middle and end are read.
    """
    head = text[:_PIECE_BYTES]
    size = _PIECE_BYTES * len(head) // max(1, len(head.encode()))
    if len(text) > _PIECES * size:
        step = (len(text) - size) // (_PIECES - 1)
        text = "\n".join(text[start : start + size] for start in range(0, _PIECES * step, step))
    return {code: float(probability) for code, probability in _identifier().rank(text)}
