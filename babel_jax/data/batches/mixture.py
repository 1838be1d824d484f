"""Mixtures: the share of a stage's tokens that each language and kind gets, and the passes over its text."""

import dataclasses
import itertools
from collections.abc import Collection, Hashable, Mapping
from typing import Any, TypeVar

from babel_jax.config import MixtureSettings, Strategy
from babel_jax.data.windows.prepared import Supply
from babel_jax.errors import BadInput
from babel_jax.languages import LANGUAGES, Resource, position

CURATED, TEXTBOOK = "curated", "textbook"
_TOLERANCE = 1e-6  # of a share of all tokens
_REPETITIONS = 50  # of `make_mixture_of_steps`; two or three are enough if no window is half empty
_LEAST_WEIGHT = 1e-100  # `water_fill` divides by weights, and a temperature near 0 rounds small ones to 0
Key = TypeVar("Key", bound=Hashable)
Dataset = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class MixtureRow:
    """One dataset: the tokens that it has, its share of the stage's tokens, and the expected passes over it
    (epochs).
    """

    language: str
    kind: str
    tokens: int
    share: float
    epochs: float


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The rows of a stage; their shares add up to 1. `warnings` name the settings that could not be kept."""

    rows: tuple[MixtureRow, ...]
    warnings: tuple[str, ...] = ()

    @property
    def languages(self) -> dict[str, float]:
        """The share of each language."""
        shares: dict[str, list[float]] = {}
        for row in self.rows:
            shares.setdefault(row.language, []).append(row.share)
        return {code: sum(row_shares) for code, row_shares in shares.items()}

    def table(self) -> str:
        """The rows as aligned text, followed by the warnings."""
        width = max(len(row.kind) for row in self.rows)
        lines = [f"language  {'kind':<{width}} {'tokens':>16} {'share %':>9} {'epochs':>8}"]
        for row in self.rows:
            lines.append(
                f"{row.language:<8}  {row.kind:<{width}} {row.tokens:>16,} {100 * row.share:>9.4f} "
                f"{row.epochs:>8.3f}"
            )
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The rows and warnings as plain values."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows], "warnings": list(self.warnings)}


def make_mixture(available: Mapping[Dataset, int], settings: MixtureSettings, budget_tokens: int) -> Mixture:
    """Shares `budget_tokens` among the datasets of `available` (tokens by language and kind).

    1. Each language of `settings.curated` gets its share of the whole, and no more: from its `curated` kind
       (else `textbook`, else any), then from its other kinds.
    2. Each language of `settings.curated_extra` gets a share in addition to its part of the rest: from its
       `curated` kind (else `textbook`, else any) alone, as far as `max_epochs` allows. Its kind `curated`
       then gets nothing of the rest.
    3. The rest is shared among the other languages by the strategy (times `low_resource_multiplier`) and,
       within a language, in proportion to the tokens of its kinds (times `textbook_multiplier`). Both use
       water-filling: no dataset is read more than `max_epochs` times, and the others get the tokens that it
       cannot take.

    If the datasets of step 3 cannot take the rest, they are read equally often, above the cap, with a
    warning. There is also a warning if a language of `curated` gets another share than its setting says.
    Raises BadInput for a language without data, and for weights that do not fit `languages`.
    """
    supply = _with_text(available)
    languages = _languages(supply, settings)

    # Steps 1 and 2: shares of the whole budget.
    extra = {_curated(code, supply): share for code, share in settings.curated_extra.items()}
    base = _base(supply, languages, extra, settings)
    tokens = dict.fromkeys([*base, *extra], 0.0)
    for dataset, share in extra.items():
        tokens[dataset] = min(share * budget_tokens, settings.max_epochs * supply[dataset])
    for code, share in settings.curated.items():
        tokens |= _tokens_of_share(share * budget_tokens, code, supply, settings)

    # If the cap is too low to spend the rest, the base is read as often as it takes.
    rest = budget_tokens - sum(tokens.values())
    base_tokens = sum(tokens[dataset] for dataset in base)
    base_supply = sum(supply[dataset] for dataset in base)
    passes = max(settings.max_epochs, (rest + base_tokens) / base_supply)

    # Step 3.
    rooms = {dataset: passes * supply[dataset] - tokens[dataset] for dataset in base}
    for dataset, more in _shared_rest(rest, rooms, supply, settings).items():
        tokens[dataset] += more

    mixture = Mixture(_rows(tokens, supply, budget_tokens))
    warnings = _warnings(mixture, settings, budget_tokens, passes, languages)
    return dataclasses.replace(mixture, warnings=tuple(warnings))


def _with_text(available: Mapping[Dataset, int]) -> dict[Dataset, int]:
    """The datasets that are not empty, in the registry's order of languages.

    The order decides how sums of floats round, so it must not depend on the order on disk.
    """
    ordered = sorted(available, key=lambda dataset: (position(dataset[0]), dataset[1]))
    return {dataset: available[dataset] for dataset in ordered if available[dataset] > 0}


def _base(
    supply: Mapping[Dataset, int],
    languages: Collection[str],
    extra: Collection[Dataset],
    settings: MixtureSettings,
) -> list[Dataset]:
    """The datasets that share the rest of the budget."""
    base = [dataset for dataset in supply if dataset[0] in languages]
    # Curated text with a share of its own gets nothing of the rest, unless nothing else is left.
    without_extra = []
    for dataset in base:
        if dataset[1] != CURATED or dataset not in extra:
            without_extra.append(dataset)
    base = without_extra or base
    # If every language has a fixed share, there is no other language to take the rest.
    without_fixed_share = [dataset for dataset in base if dataset[0] not in settings.curated]
    return without_fixed_share or base


def _shared_rest(
    rest: float,
    rooms: Mapping[Dataset, float],
    supply: Mapping[Dataset, int],
    settings: MixtureSettings,
) -> dict[Dataset, float]:
    """The tokens of each dataset in step 3 of `make_mixture`: `rest` is shared among the languages, then
    among the kinds of each language.

    rooms: the tokens that each dataset can still take.
    """
    rooms_of: dict[str, dict[Dataset, float]] = {}
    for dataset, room in rooms.items():
        rooms_of.setdefault(dataset[0], {})[dataset] = room
    language_supply, language_rooms = {}, {}
    for code, kind_rooms in rooms_of.items():
        language_supply[code] = sum(supply[dataset] for dataset in kind_rooms)
        language_rooms[code] = sum(kind_rooms.values())
    # First among languages, so that a language with many kinds gets no more than one with few.
    by_language = water_fill(rest, _weights(language_supply, settings), language_rooms)

    tokens: dict[Dataset, float] = {}
    for code, kind_rooms in rooms_of.items():
        kind_weights = {dataset: _kind_weight(dataset, supply, settings) for dataset in kind_rooms}
        tokens |= water_fill(by_language[code], kind_weights, kind_rooms)
    return tokens


def _rows(
    tokens: Mapping[Dataset, float], supply: Mapping[Dataset, int], budget_tokens: int
) -> tuple[MixtureRow, ...]:
    """The datasets that get tokens, with their shares of the whole."""
    # The sum differs from budget_tokens by rounding; shares must add up to 1.
    spent = sum(tokens.values())
    rows = []
    for dataset, supply_tokens in supply.items():
        if tokens.get(dataset, 0.0) > 0:
            share = tokens[dataset] / spent
            epochs = share * budget_tokens / supply_tokens
            rows.append(MixtureRow(*dataset, tokens=supply_tokens, share=share, epochs=epochs))
    return tuple(rows)


def _kind_weight(dataset: Dataset, supply: Mapping[Dataset, int], settings: MixtureSettings) -> float:
    """The weight of a dataset within its language: its tokens, multiplied for textbooks."""
    multiplier = settings.textbook_multiplier if dataset[1] == TEXTBOOK else 1.0
    return supply[dataset] * multiplier


def _warnings(
    mixture: Mixture,
    settings: MixtureSettings,
    budget_tokens: int,
    passes: float,
    languages: Collection[str],
) -> list[str]:
    """The settings that the mixture could not keep."""
    warnings = []
    if passes > settings.max_epochs * (1 + 1e-9):
        warnings.append(
            f"there is too little text for {budget_tokens:,} tokens: it is read {passes:.2f} times, "
            f"max_epochs = {settings.max_epochs:g}"
        )

    # Why a curated share is not kept: the cap on epochs, or no other language to take the rest.
    if any(code not in settings.curated for code in languages):
        reason = f"its text would be read more than max_epochs = {settings.max_epochs:g} times"
    else:
        reason = "no language has the rest"
    shares = mixture.languages
    for code, wanted in settings.curated.items():
        share = shares.get(code, 0.0)
        if abs(share - wanted) > _TOLERANCE:
            warnings.append(f"curated gives {code} {share:.1%} of the tokens, not {wanted:.1%}: {reason}")
    return warnings


def make_mixture_of_steps(
    supplies: Mapping[Dataset, Supply], settings: MixtureSettings, windows: int
) -> tuple[Mixture, int]:
    """The mixture of a stage that reads `windows` windows, and its tokens; padding does not count.

    The mixture decides how many tokens the windows hold. The tokens in turn decide the mixture, if a cap
    holds. So they are computed in turn until the tokens stay the same.
    """
    available = {key: supply.tokens for key, supply in supplies.items()}
    fullest = max((supply.tokens_per_window for supply in supplies.values()), default=1.0)
    # Begins with the most tokens: all windows as full as those of the fullest dataset.
    budget = windows * max(1, round(fullest))
    for _ in range(_REPETITIONS):
        mixture = make_mixture(available, settings, budget)
        before, budget = budget, max(1, round(windows * tokens_per_window(mixture, supplies)))
        if budget == before:
            break
    return mixture, budget


def tokens_per_window(mixture: Mixture, supplies: Mapping[Dataset, Supply]) -> float:
    """The mean tokens per window of a mixture. Shares are of tokens, so half-empty windows are read more
    often.
    """
    return 1 / sum(row.share / supplies[row.language, row.kind].tokens_per_window for row in mixture.rows)


def water_fill(
    total: float, weights: Mapping[Key, float], capacities: Mapping[Key, float]
) -> dict[Key, float]:
    """Shares `total` in proportion to weights, with no share above its capacity. What a capacity cuts off
    goes to the others.

    So there is a level L with share = min(L * weight, capacity). Any tokens above the sum of all capacities
    are not shared.
    """
    # In the order in which the capacities are reached as the level rises.
    order = sorted(weights, key=lambda key: capacities[key] / weights[key])
    # Summed from the end: subtraction from the total would round away small weights beside large ones.
    weights_left = list(itertools.accumulate(weights[key] for key in reversed(order)))[::-1]
    shares = {}
    left = total
    for key, weight_left in zip(order, weights_left, strict=True):
        shares[key] = min(capacities[key], left * (weights[key] / weight_left))
        left = max(0.0, left - shares[key])
    return shares


def _tokens_of_share(
    total: float, code: str, supply: Mapping[Dataset, int], settings: MixtureSettings
) -> dict[Dataset, float]:
    """Tokens of a language's datasets that add up to `total`, as far as the cap allows; curated text comes
    first.
    """
    first = _curated(code, supply)
    others = [key for key in supply if key[0] == code and key != first]
    # The curated kind alone, up to its cap. The other kinds get what is left.
    first_tokens = min(total, settings.max_epochs * supply[first])
    weights = {key: _kind_weight(key, supply, settings) for key in others}
    capacities = {key: settings.max_epochs * supply[key] for key in others}
    return {first: first_tokens} | water_fill(total - first_tokens, weights, capacities)


def _curated(code: str, supply: Mapping[Dataset, int]) -> Dataset:
    """The dataset used as a language's curated text: of kind curated, else textbook, else its first kind."""
    kinds = [kind for language, kind in supply if language == code]
    for kind in (CURATED, TEXTBOOK):
        if kind in kinds:
            return code, kind
    return code, kinds[0]


def _weights(tokens: Mapping[str, int], settings: MixtureSettings) -> dict[str, float]:
    """The weight of each language; only the proportions count."""
    match settings.strategy:
        case Strategy.EQUAL:
            weights = dict.fromkeys(tokens, 1.0)
        case Strategy.TEMPERATURE:
            # In proportion to the largest, so that no power overflows.
            most = max(tokens.values())
            exponent = 1 / settings.temperature
            weights = {}
            for code, count in tokens.items():
                weights[code] = max((count / most) ** exponent, _LEAST_WEIGHT)
        case Strategy.WEIGHTS:
            weights = {code: settings.weights[code] for code in tokens}
    # After the strategy, so that the multiplier means the same with each strategy.
    for code in weights:
        if LANGUAGES[code].resource is Resource.LOW:
            weights[code] *= settings.low_resource_multiplier
    return weights


def _languages(supply: Mapping[Dataset, int], settings: MixtureSettings) -> tuple[str, ...]:
    """The languages of the mixture: the keys of `weights`, else `languages`, else all languages with text."""
    with_data = tuple(dict.fromkeys(code for code, _ in supply))
    named = dict.fromkeys([*settings.languages, *settings.weights, *settings.curated_languages])
    missing = [code for code in named if code not in with_data]
    if missing:
        raise BadInput(
            f"mixture: no text for {', '.join(missing)}; there is text for "
            f"{' '.join(with_data) or 'no language'}"
        )

    # Both name the languages, so they must name the same.
    if settings.weights and settings.languages and set(settings.weights) != set(settings.languages):
        differing = sorted(set(settings.weights) ^ set(settings.languages))
        raise BadInput(
            f"mixture: languages and weights differ in {', '.join(differing)}; name the same in both, or "
            "leave languages out"
        )
    if not with_data:
        raise BadInput("mixture: there is no prepared text")
    return tuple(settings.weights) or settings.languages or with_data
