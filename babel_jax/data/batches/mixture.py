"""Mixtures: what share of a stage's tokens each language and kind gets, and how often its
text is then read.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

from babel_jax.config import MixtureSettings, Strategy
from babel_jax.data.windows.prepared import Supply
from babel_jax.errors import BadInput
from babel_jax.languages import CODES, LANGUAGES, Resource

CURATED, TEXTBOOK = "curated", "textbook"
_TOLERANCE = 1e-6  # of a share of all tokens
_REPETITIONS = 50  # two or three are enough where no window is half empty
_LEAST_WEIGHT = 1e-100  # what a temperature near 0 leaves of all but the largest; 0 could not be divided by
Key = TypeVar("Key", bound=Hashable)
Dataset = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class MixtureRow:
    """One dataset's part: tokens it has, its share of the stage's tokens, and the expected passes over it."""

    language: str
    kind: str
    tokens: int
    share: float
    epochs: float


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The rows of a stage, shares adding up to 1; `warnings` say what could not be kept."""

    rows: tuple[MixtureRow, ...]
    warnings: tuple[str, ...] = ()

    @property
    def languages(self) -> dict[str, float]:
        """The share of each language."""
        return {
            code: sum(row.share for row in self.rows if row.language == code)
            for code in dict.fromkeys(row.language for row in self.rows)
        }

    def table(self) -> str:
        """The rows as aligned text, with the warnings below."""
        width = max(len(row.kind) for row in self.rows)
        lines = [f"language  {'kind':<{width}} {'tokens':>16} {'share %':>9} {'epochs':>8}"]
        lines += [
            (
                f"{row.language:<8}  {row.kind:<{width}} {row.tokens:>16,} {100 * row.share:>9.4f} "
                f"{row.epochs:>8.3f}"
            )
            for row in self.rows
        ]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def to_json(self) -> dict[str, Any]:
        """The rows and warnings as plain values."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows], "warnings": list(self.warnings)}


def make_mixture(available: Mapping[Dataset, int], settings: MixtureSettings, budget_tokens: int) -> Mixture:
    """Shares `budget_tokens` among the datasets of `available` (tokens by language and kind).

    First each language of `settings.curated` gets its share of the whole, and no more: from its `curated`
    kind (else `textbook`, else any), then from its other kinds. Each language of `settings.curated_extra`
    gets such a share on top of its own part; a kind `curated` then gets nothing else. The rest is shared
    among the other languages by the strategy and, inside a language, in proportion to the tokens of its
    kinds, both by water-filling: no dataset is read more than `max_epochs` times, and what it cannot take
    goes to the others. When all together cannot take the budget, all are read equally often above the cap,
    and a warning says so, as it does where `curated` gives a language another share than was asked for.
    Raises BadInput for a language without data and for a table of weights that does not fit `languages`.
    """
    supply = {
        key: available[key]
        for key in sorted(available, key=lambda key: (CODES.index(key[0]), key[1]))
        if available[key] > 0
    }
    languages = _languages(supply, settings)
    extra = {_curated(code, supply): share for code, share in settings.curated_extra.items()}
    base = [key for key in supply if key[0] in languages and not (key in extra and key[1] == CURATED)]
    base = base or [key for key in supply if key[0] in languages]
    # Where every language has a total, there is no other to take the rest.
    base = [key for key in base if key[0] not in settings.curated] or base

    tokens = dict.fromkeys([*base, *extra], 0.0)
    for key, share in extra.items():
        tokens[key] = min(share * budget_tokens, settings.max_epochs * supply[key])
    for code, share in settings.curated.items():
        tokens |= _of_total(share * budget_tokens, code, supply, settings)
    rest = budget_tokens - sum(tokens.values())
    # As many passes over the base as it takes to spend the rest, where the cap does not allow for it.
    passes = max(
        settings.max_epochs, (rest + sum(tokens[key] for key in base)) / sum(supply[key] for key in base)
    )
    room = {key: passes * supply[key] - tokens[key] for key in base}
    kinds = {
        code: [key for key in base if key[0] == code] for code in dict.fromkeys(code for code, _ in base)
    }
    weights = _weights({code: sum(supply[key] for key in own) for code, own in kinds.items()}, settings)
    by_language = water_fill(
        rest, weights, {code: sum(room[key] for key in own) for code, own in kinds.items()}
    )
    for code, own in kinds.items():
        own_weights = {
            key: supply[key] * (settings.textbook_multiplier if key[1] == TEXTBOOK else 1.0) for key in own
        }
        for key, more in water_fill(by_language[code], own_weights, {key: room[key] for key in own}).items():
            tokens[key] += more

    spent = sum(tokens.values())
    rows = tuple(
        MixtureRow(
            *key,
            tokens=supply[key],
            share=tokens[key] / spent,
            epochs=tokens[key] / spent * budget_tokens / supply[key],
        )
        for key in supply
        if tokens.get(key, 0.0) > 0
    )
    mixture = Mixture(rows)
    warnings = []
    if passes > settings.max_epochs * (1 + 1e-9):
        warnings.append(
            f"there is too little text for {budget_tokens:,} tokens: it is read {passes:.2f} times, "
            f"max_epochs = {settings.max_epochs:g}"
        )
    has_others = any(code not in settings.curated for code in languages)
    reason = (
        f"its text would be read more than max_epochs = {settings.max_epochs:g} times"
        if has_others
        else "no language has the rest"
    )
    for code, share in settings.curated.items():
        given = mixture.languages.get(code, 0.0)
        if abs(given - share) > _TOLERANCE:
            warnings.append(f"curated gives {code} {given:.1%} of the tokens, not {share:.1%}: {reason}")
    return Mixture(rows, tuple(warnings))


def make_mixture_of_steps(
    supplies: Mapping[Dataset, Supply], settings: MixtureSettings, windows: int
) -> tuple[Mixture, int]:
    """The mixture of a stage that reads so many windows, and its tokens: padding is none of them.

    How many tokens the windows hold depends on the mixture, and where a cap holds, the mixture on the tokens:
    found by repetition.
    """
    available = {key: supply.tokens for key, supply in supplies.items()}
    budget = (
        windows * max(1, round(max(supply.tokens_per_window for supply in supplies.values())))
        if supplies
        else windows
    )
    for _ in range(_REPETITIONS):
        mixture = make_mixture(available, settings, budget)
        before, budget = budget, max(1, round(windows * tokens_per_window(mixture, supplies)))
        if budget == before:
            break
    return mixture, budget


def tokens_per_window(mixture: Mixture, supplies: Mapping[Dataset, Supply]) -> float:
    """The mean tokens of the windows that a mixture reads: shares are of tokens, so that half-empty windows
    are read more often.
    """
    return 1 / sum(row.share / supplies[row.language, row.kind].tokens_per_window for row in mixture.rows)


def water_fill(
    total: float, weights: Mapping[Key, float], capacities: Mapping[Key, float]
) -> dict[Key, float]:
    """Shares `total` in proportion to weights, none above its capacity; what the full ones leave goes to the
    others alike.

    So there is a level L with share = min(L * weight, capacity). What exceeds all capacities together is not
    shared out.
    """
    order = sorted(weights, key=lambda key: capacities[key] / weights[key])
    # Summed from the end: to subtract from the whole would lose small weights beside large ones.
    weights_left = list(itertools.accumulate(weights[key] for key in reversed(order)))[::-1]
    shares = {}
    left = total
    for key, weight_left in zip(order, weights_left, strict=True):
        shares[key] = min(capacities[key], left * (weights[key] / weight_left))
        left = max(0.0, left - shares[key])
    return shares


def _of_total(
    total: float, code: str, supply: Mapping[Dataset, int], settings: MixtureSettings
) -> dict[Dataset, float]:
    """The tokens of a language's datasets that add up to `total`, as far as the cap allows: curated text
    first.
    """
    first = _curated(code, supply)
    others = [key for key in supply if key[0] == code and key != first]
    own = {first: min(total, settings.max_epochs * supply[first])}
    weights = {
        key: supply[key] * (settings.textbook_multiplier if key[1] == TEXTBOOK else 1.0) for key in others
    }
    capacities = {key: settings.max_epochs * supply[key] for key in others}
    return own | water_fill(total - own[first], weights, capacities)


def _curated(code: str, supply: Mapping[Dataset, int]) -> Dataset:
    """The dataset that stands for a language's curated text: of kind curated, else textbook, else the first
    that there is.
    """
    kinds = [kind for language, kind in supply if language == code]
    return code, next((kind for kind in (CURATED, TEXTBOOK) if kind in kinds), kinds[0])


def _weights(tokens: Mapping[str, int], settings: MixtureSettings) -> dict[str, float]:
    """The weight of each language; only their proportions count."""
    match settings.strategy:
        case Strategy.EQUAL:
            weights = dict.fromkeys(tokens, 1.0)
        case Strategy.TEMPERATURE:
            most = max(tokens.values())
            weights = {
                code: max((own / most) ** (1 / settings.temperature), _LEAST_WEIGHT)
                for code, own in tokens.items()
            }
        case Strategy.WEIGHTS:
            weights = {code: settings.weights[code] for code in tokens}
    low = settings.low_resource_multiplier
    return {
        code: weight * (low if LANGUAGES[code].resource is Resource.LOW else 1.0)
        for code, weight in weights.items()
    }


def _languages(supply: Mapping[Dataset, int], settings: MixtureSettings) -> tuple[str, ...]:
    """The languages that share the base of the mixture."""
    with_data = tuple(dict.fromkeys(code for code, _ in supply))
    named = dict.fromkeys([*settings.languages, *settings.weights, *settings.curated_languages])
    missing = [code for code in named if code not in with_data]
    if missing:
        raise BadInput(
            f"mixture: no text for {', '.join(missing)}; there is text for "
            f"{' '.join(with_data) or 'no language'}"
        )
    if settings.weights and settings.languages and set(settings.weights) != set(settings.languages):
        differing = sorted(set(settings.weights) ^ set(settings.languages))
        raise BadInput(
            f"mixture: languages and weights differ in {', '.join(differing)}; name the same in both, or "
            "leave languages out"
        )
    if not with_data:
        raise BadInput("mixture: there is no prepared text")
    return tuple(settings.weights) or settings.languages or with_data
