"""Whether a text is in the language that its source names: by a model in fastText's format that the user
names (GlotLID, OpenLID, lid.176), else by py3langid (Lui and Baldwin 2012; Barbaresi).

py3langid compares a language with Babel's 25 alone: near languages, such as Bosnian and Croatian, take all
probability from each other. A language that the model does not know keeps the label of its source.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from babel_jax.errors import BadInput, one_line
from babel_jax.languages import BABEL, known_language, language

# The accuracy is 98.5% on lines of 110 characters and 99.2% on whole documents (docs/log.md). The time grows
# with the length, so pieces of a long document are read: several, because one may be a list of names or code.
_PIECES, _PIECE_BYTES = 3, 250
_LABEL = "__label__"  # before the name of a language, in fastText's models
BY_SOURCE = "the source's label"


def identified_by(code: str, model: str | None) -> str:
    """The method that identifies a language: the file name of the model, "py3langid", or `BY_SOURCE`."""
    if model is not None:
        return Path(model).name if code in _model(model).labels else BY_SOURCE
    return "py3langid" if code in _known() else BY_SOURCE


def probability_of(text: str, code: str, model: str | None = None) -> float | None:
    """The probability that a text is in a language; None if no model knows the language, so that the label of
    the text's source counts.

    model: the path of a model in fastText's format. Of a long text, pieces from its beginning, middle and end
    are read. Raises BadInput for a model that cannot be read.
    """
    if identified_by(code, model) == BY_SOURCE:
        return None
    if model is not None:
        return _model(model).probability_of(_pieces(text), code)
    return language_probabilities(text, code)[code]


def language_probabilities(text: str, code: str = BABEL[0]) -> dict[str, float]:
    """py3langid's probability of each of Babel's languages, and of the language `code`; likeliest first."""
    ranked = _identifier(code).rank(_pieces(text))
    return {language(theirs).code: float(probability) for theirs, probability in ranked}


def _pieces(text: str) -> str:
    head = text[:_PIECE_BYTES]
    # As many characters as fill _PIECE_BYTES bytes in this script: a Thai character has 3 bytes.
    size = _PIECE_BYTES * len(head) // max(1, len(head.encode()))
    if len(text) > _PIECES * size:
        step = (len(text) - size) // (_PIECES - 1)
        text = "\n".join(text[start : start + size] for start in range(0, _PIECES * step, step))
    return text


@functools.cache
def _known() -> dict[str, str]:
    """{our code: py3langid's} of the languages that it knows."""
    known: dict[str, str] = {}
    for theirs in LanguageIdentifier.from_model_file(MODEL_FILE).nb_classes:
        ours = known_language(theirs)
        if ours is not None:
            known.setdefault(ours.code, theirs)
    return known


@functools.lru_cache(maxsize=4)
def _identifier(code: str) -> LanguageIdentifier:
    """py3langid, which chooses among Babel's languages and this one."""
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    # Babel's codes are py3langid's own.
    identifier.set_languages(BABEL if code in BABEL else (*BABEL, _known()[code]))
    return identifier


class _FastTextModel:
    """A classifier in fastText's format, .bin or .ftz. labels: {our code: its labels of that language}."""

    def __init__(self, path: str):
        try:
            import fasttext
        except ImportError:
            raise BadInput(
                "data.cleaning.language_model needs fasttext-predict; pip install 'babel-jax[lid]'"
            ) from None
        try:
            self._model: Any = fasttext.load_model(path).f
            names = [name for name, _ in self._predicted("a")]
        # The library raises ValueError, RuntimeError and, for memory, its own errors.
        except Exception as error:
            raise BadInput(
                f"data.cleaning.language_model: {path} is no model in fastText's format: "
                f"{one_line(error, 150)}"
            ) from None
        # Labels of one language differ between models, such as __label__yo and __label__yor_Latn.
        self.labels: dict[str, set[str]] = {}
        for name in names:
            known = known_language(name.removeprefix(_LABEL))
            if known is not None:
                self.labels.setdefault(known.code, set()).add(name)
        if not self.labels:
            raise BadInput(
                f"data.cleaning.language_model: {path} has no label of a language, such as {_LABEL}yor_Latn"
            )

    def probability_of(self, text: str, code: str) -> float:
        """The sum over the model's labels of the language: a macrolanguage may have several."""
        labels = self.labels[code]
        return float(sum(value for name, value in self._predicted(text) if name in labels))

    def _predicted(self, text: str) -> Iterator[tuple[str, float]]:
        """(label, probability) of all labels. A line end would end the text.

        The binding is called as the library's Python does: that of `fasttext` needs a NumPy before 2 for one
        text, and that of `fasttext-predict` fails for several.
        """
        for value, name in self._model.predict(text.replace("\n", " ") + "\n", -1, 0.0, "strict"):
            yield name, value


@functools.lru_cache(maxsize=1)
def _model(path: str) -> _FastTextModel:
    return _FastTextModel(path)
