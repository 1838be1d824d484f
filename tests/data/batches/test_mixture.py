import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from babel_jax.config import MixtureSettings, Strategy
from babel_jax.data.batches.mixture import make_mixture, make_mixture_of_steps, water_fill
from babel_jax.data.windows.prepared import Supply
from babel_jax.errors import BadInput
from babel_jax.languages import BABEL, LANGUAGES, Resource

supplies = st.dictionaries(
    st.tuples(st.sampled_from(BABEL), st.sampled_from(["web", "textbook", "curated"])),
    st.integers(1, 10**12),
    min_size=1,
    max_size=40,
)
multipliers = st.floats(0.1, 10)


def tokens_of(language, available):
    """The tokens of all datasets of a language."""
    return sum(tokens for (code, _), tokens in available.items() if code == language)


def level(total, weights, capacities):
    """The water level by bisection: the L at which min(L * weight, capacity) add up to the total."""
    low, high = 0.0, total / weights.min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.minimum(middle * weights, capacities).sum() < total else (low, middle)
        )
    return low


def by_bisection(available, settings, budget):
    """Tokens of each dataset by the definition of the mixture, for settings without curated shares and enough
    supply at the cap.
    """
    codes = sorted({code for code, _ in available})
    supply = np.array([tokens_of(code, available) for code in codes], float)
    weights = {
        Strategy.EQUAL: np.ones(len(codes)),
        Strategy.TEMPERATURE: np.exp(np.log(supply) / settings.temperature),
        Strategy.WEIGHTS: np.array([settings.weights.get(code, 0) for code in codes]),
    }[settings.strategy]
    weights = weights * np.array(
        [
            settings.low_resource_multiplier if LANGUAGES[code].resource is Resource.LOW else 1
            for code in codes
        ]
    )
    capacities = settings.max_epochs * supply
    tokens = {}
    for code, own in zip(
        codes, np.minimum(level(budget, weights, capacities) * weights, capacities), strict=True
    ):
        kinds = [key for key in available if key[0] == code]
        sizes = np.array([available[key] for key in kinds], float)
        wanted = sizes * np.array(
            [settings.textbook_multiplier if kind == "textbook" else 1 for _, kind in kinds]
        )
        shares = np.minimum(
            level(own, wanted, settings.max_epochs * sizes) * wanted, settings.max_epochs * sizes
        )
        tokens |= dict(zip(kinds, shares, strict=True))
    return tokens


@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.just(0.0) | st.floats(1e-3, 1e9)), min_size=1, max_size=30),
    st.floats(1e-3, 1),
)
def test_water_filling_finds_the_level(parts, fraction):
    weights, capacities = (np.array(column) for column in zip(*parts, strict=True))
    total = fraction * capacities.sum()
    assume(total > 0)
    shares = water_fill(total, dict(enumerate(weights)), dict(enumerate(capacities)))
    expected = np.minimum(level(total, weights, capacities) * weights, capacities)
    np.testing.assert_allclose(
        [shares[number] for number in range(len(parts))], expected, rtol=1e-6, atol=1e-9 * total
    )


@given(
    supplies,
    st.sampled_from(Strategy),
    st.floats(0.3, 10),
    multipliers,
    multipliers,
    st.floats(0.01, 0.999),
    st.floats(0.5, 10),
    st.randoms(),
)
def test_mixtures_are_those_of_the_definition(
    available, strategy, temperature, low, textbook, used, max_epochs, random
):
    weights = (
        {code: random.uniform(0.1, 5) for code in {code for code, _ in available}}
        if strategy is Strategy.WEIGHTS
        else {}
    )
    settings = MixtureSettings(
        strategy=strategy,
        temperature=temperature,
        weights=weights,
        low_resource_multiplier=low,
        textbook_multiplier=textbook,
        max_epochs=max_epochs,
    )
    budget = max(1, int(used * max_epochs * sum(available.values())))
    assume(budget <= max_epochs * sum(available.values()))
    mixture = make_mixture(available, settings, budget)
    assert abs(sum(row.share for row in mixture.rows) - 1) < 1e-9
    assert not mixture.warnings
    expected = by_bisection(available, settings, budget)
    given_tokens = {(row.language, row.kind): row.share * budget for row in mixture.rows}
    for key, tokens in expected.items():
        assert given_tokens.get(key, 0.0) == pytest.approx(tokens, rel=1e-5, abs=1e-6 * budget)
    for row in mixture.rows:
        assert row.tokens == available[row.language, row.kind]
        assert row.epochs == pytest.approx(row.share * budget / row.tokens)
        assert row.epochs <= max_epochs * (1 + 1e-6)


@given(
    supplies,
    st.integers(1, 10**15),
    st.dictionaries(st.sampled_from(BABEL), st.floats(0, 0.03)),
    st.floats(0.5, 10),
)
def test_shares_always_add_up_and_only_a_warning_breaks_the_cap(available, budget, curated, max_epochs):
    with_data = {code for code, _ in available}
    curated = {code: share for code, share in curated.items() if code in with_data}
    mixture = make_mixture(available, MixtureSettings(curated=curated, max_epochs=max_epochs), budget)
    assert abs(sum(row.share for row in mixture.rows) - 1) < 1e-9
    assert all(row.share > 0 for row in mixture.rows)
    most = max(row.epochs for row in mixture.rows)
    assert most <= max_epochs * (1 + 1e-6) or mixture.warnings


def test_equal_as_supply_allows():
    available = {("en", "web"): 1000, ("zh", "web"): 1000, ("sw", "web"): 50, ("ha", "web"): 10}
    mixture = make_mixture(available, MixtureSettings(max_epochs=2), 1000)
    # 250 each would be 5 and 25 epochs of the two small ones: they give 100 and 20, and 880 is left for the
    # others.
    assert {row.language: round(row.share, 12) for row in mixture.rows} == {
        "en": 0.44,
        "zh": 0.44,
        "sw": 0.1,
        "ha": 0.02,
    }
    assert [round(row.epochs, 9) for row in mixture.rows] == [0.44, 0.44, 2, 2]


def test_extra_curated_shares_come_on_top():
    available = {
        ("en", "web"): 1000,
        ("en", "curated"): 1000,
        ("zh", "web"): 1000,
        ("zh", "textbook"): 1000,
        ("sw", "web"): 1000,
    }
    mixture = make_mixture(available, MixtureSettings(curated_extra={"en": 0.3, "zh": 0.1}), 1000)
    shares = {(row.language, row.kind): round(row.share, 12) for row in mixture.rows}
    assert shares == {
        ("en", "curated"): 0.3,
        ("en", "web"): 0.2,
        ("zh", "textbook"): 0.2,
        ("zh", "web"): 0.1,
        ("sw", "web"): 0.2,
    }
    assert {code: round(share, 12) for code, share in mixture.languages.items()} == {
        "en": 0.5,
        "zh": 0.3,
        "sw": 0.2,
    }


def shares_of(available, budget=1000, **settings):
    mixture = make_mixture(available, MixtureSettings(**settings), budget)
    return {(row.language, row.kind): round(row.share, 12) for row in mixture.rows}, mixture.warnings


def test_a_curated_share_is_the_total_of_its_language():
    web = {(code, "web"): 1000 for code in ("en", "zh", "sw")}
    assert shares_of(web, curated={"en": 0.3}) == (
        {("en", "web"): 0.3, ("zh", "web"): 0.35, ("sw", "web"): 0.35},
        (),
    )
    # Curated text first: 4 passes over 50 tokens, then the language's other kinds in proportion to their
    # tokens.
    some = {**web, ("en", "curated"): 50, ("en", "news"): 3000}
    assert shares_of(some, curated={"en": 0.6}, max_epochs=4.0) == (
        {
            ("en", "curated"): 0.2,
            ("en", "news"): 0.3,
            ("en", "web"): 0.1,
            ("zh", "web"): 0.2,
            ("sw", "web"): 0.2,
        },
        (),
    )
    # A total and a share on top side by side: 30% English, 10% + 30% Chinese, 30% Swahili.
    assert shares_of(web, curated={"en": 0.3}, curated_extra={"zh": 0.1})[0] == {
        ("en", "web"): 0.3,
        ("zh", "web"): 0.4,
        ("sw", "web"): 0.3,
    }
    # Whatever the weight of the language is.
    weighted = {"strategy": Strategy.WEIGHTS, "weights": {"en": 9, "sw": 1}}
    assert shares_of(web, curated={"en": 0.3}, **weighted)[0] == {("en", "web"): 0.3, ("sw", "web"): 0.7}


def test_a_total_that_cannot_be_had_is_said():
    available = {("en", "web"): 10, ("sw", "web"): 1000}
    shares, warnings = shares_of(available, curated={"en": 0.5}, max_epochs=4.0)
    assert shares == {("en", "web"): 0.04, ("sw", "web"): 0.96}
    assert warnings == (
        (
            "curated gives en 4.0% of the tokens, not 50.0%: its text would be read more than max_epochs = "
            "4 times"
        ),
    )
    shares, warnings = shares_of({("en", "web"): 1000}, curated={"en": 0.3})
    assert shares == {("en", "web"): 1.0}
    assert warnings == ("curated gives en 100.0% of the tokens, not 30.0%: no language has the rest",)


@given(supplies, st.dictionaries(st.sampled_from(BABEL), st.floats(0.001, 0.03)), st.floats(0.01, 0.5))
def test_totals_are_kept_wherever_there_is_text_enough(available, curated, used):
    with_data = {code for code, _ in available}
    curated = {code: share for code, share in curated.items() if code in with_data}
    assume(with_data - curated.keys())
    least = min(tokens_of(code, available) for code in with_data)
    budget = max(1, int(used * least))
    mixture = make_mixture(available, MixtureSettings(curated=curated), budget)
    assert not mixture.warnings
    for code, share in curated.items():
        assert mixture.languages.get(code, 0.0) == pytest.approx(share, abs=1e-9)


def test_curated_settings_that_cannot_be():
    with pytest.raises(ValueError, match="curated and curated_extra both name en"):
        MixtureSettings(curated={"en": 0.1}, curated_extra={"en": 0.1})
    with pytest.raises(ValueError, match=r"add up to 1\.2; they must stay below 1"):
        MixtureSettings(curated={"en": 0.6}, curated_extra={"zh": 0.6})


def test_ordinary_text_stands_in_for_curated_text_that_is_not_there():
    available = {("en", "web"): 1000, ("zh", "news"): 1000, ("zh", "web"): 1000, ("sw", "web"): 1000}
    mixture = make_mixture(available, MixtureSettings(curated_extra={"en": 0.3, "zh": 0.1}), 1000)
    shares = {(row.language, row.kind): round(row.share, 12) for row in mixture.rows}
    assert shares == {("en", "web"): 0.5, ("zh", "news"): 0.2, ("zh", "web"): 0.1, ("sw", "web"): 0.2}


def test_a_curated_share_beyond_the_cap_goes_to_the_base():
    available = {("en", "curated"): 10, ("en", "web"): 1000, ("sw", "web"): 1000}
    mixture = make_mixture(available, MixtureSettings(curated_extra={"en": 0.5}, max_epochs=4), 1000)
    assert {(row.language, row.kind): round(row.share, 12) for row in mixture.rows} == {
        ("en", "curated"): 0.04,
        ("en", "web"): 0.48,
        ("sw", "web"): 0.48,
    }


def test_without_a_curated_share_the_kind_is_like_any_other():
    mixture = make_mixture({("en", "curated"): 300, ("en", "web"): 100}, MixtureSettings(), 100)
    assert [(row.kind, row.share) for row in mixture.rows] == [("curated", 0.75), ("web", 0.25)]


def test_weights_and_languages_choose_who_takes_part():
    available = {(code, "web"): 10_000 for code in ("en", "zh", "sw", "ha")}
    weighted = make_mixture(
        available,
        MixtureSettings(
            strategy=Strategy.WEIGHTS, weights={"en": 1, "sw": 1, "ha": 1}, low_resource_multiplier=2.0
        ),
        1000,
    )
    assert {row.language: round(row.share, 12) for row in weighted.rows} == {"en": 0.2, "sw": 0.4, "ha": 0.4}
    some = make_mixture(available, MixtureSettings(languages=("sw", "en")), 1000)
    assert [(row.language, row.share) for row in some.rows] == [("en", 0.5), ("sw", 0.5)]


def test_too_little_text_is_read_more_often_with_a_warning():
    mixture = make_mixture({("en", "web"): 100, ("sw", "web"): 50}, MixtureSettings(max_epochs=2), 900)
    assert [row.epochs for row in mixture.rows] == pytest.approx([6, 6])
    assert mixture.warnings == (
        "there is too little text for 900 tokens: it is read 6.00 times, max_epochs = 2",
    )
    assert mixture.table().endswith(f"warning: {mixture.warnings[0]}")


def test_temperature_goes_from_the_largest_alone_to_equal():
    available = {("en", "web"): 10**9, ("sw", "web"): 10**6}
    for temperature, share in ((0.001, 0.0), (1.0, 1 / 1001), (1000.0, 0.5)):
        mixture = make_mixture(
            available, MixtureSettings(strategy=Strategy.TEMPERATURE, temperature=temperature), 1000
        )
        assert mixture.languages.get("sw", 0.0) == pytest.approx(share, abs=0.002)


def test_the_table_and_the_json():
    mixture = make_mixture({("en", "web"): 1_234_567, ("sw", "textbook"): 890}, MixtureSettings(), 10_000)
    assert mixture.table().splitlines() == [
        "language  kind               tokens   share %   epochs",
        "en        web             1,234,567   64.4000    0.005",
        "sw        textbook              890   35.6000    4.000",
    ]
    assert json.loads(json.dumps(mixture.to_json()))["rows"][1] == {
        "language": "sw",
        "kind": "textbook",
        "tokens": 890,
        "share": pytest.approx(0.356),
        "epochs": pytest.approx(4.0),
    }


def test_web_text_takes_the_curated_share_where_there_is_nothing_better():
    available = {("en", "web"): 1000, ("sw", "web"): 1000}
    mixture = make_mixture(available, MixtureSettings(curated_extra={"en": 0.2}), 1000)
    assert mixture.languages == {"en": pytest.approx(0.6), "sw": pytest.approx(0.4)}


def test_languages_without_data_are_named_with_those_that_have():
    available = {("en", "web"): 100, ("sw", "web"): 100, ("ha", "web"): 0}
    for settings in (
        MixtureSettings(languages=("en", "ha")),
        MixtureSettings(strategy=Strategy.WEIGHTS, weights={"ha": 1.0}),
        MixtureSettings(curated={"ha": 0.1}),
        MixtureSettings(curated_extra={"ha": 0.1}),
    ):
        with pytest.raises(BadInput, match="no text for ha; there is text for en sw"):
            make_mixture(available, settings, 100)
    with pytest.raises(BadInput, match="languages and weights differ in sw"):
        make_mixture(
            available,
            MixtureSettings(strategy=Strategy.WEIGHTS, weights={"en": 1.0}, languages=("en", "sw")),
            100,
        )
    with pytest.raises(BadInput, match="there is no prepared text"):
        make_mixture({}, MixtureSettings(), 100)


# --- windows that are not full ----------------------------------------------------------------------------


def test_equal_shares_of_tokens_from_windows_that_are_half_empty():
    """Ten windows of 70 tokens and ten of 128: as many tokens of each need 128 windows of the first for 70 of
    the second.
    """
    supplies = {("en", "chat"): Supply(700, 10), ("sw", "chat"): Supply(1280, 10)}
    mixture, tokens = make_mixture_of_steps(supplies, MixtureSettings(max_epochs=100.0), 198)
    assert {row.language: row.share for row in mixture.rows} == {
        "en": pytest.approx(0.5),
        "sw": pytest.approx(0.5),
    }
    assert tokens == 128 * 70 + 70 * 128
    assert {row.language: row.epochs for row in mixture.rows} == {
        "en": pytest.approx(12.8),
        "sw": pytest.approx(7.0),
    }


def test_passes_are_counted_in_tokens():
    """20 windows of 10 are two passes, however full the windows are; a cap of 2 is not exceeded."""
    for filled in (10, 70, 128):
        mixture, tokens = make_mixture_of_steps(
            {("en", "chat"): Supply(10 * filled, 10)}, MixtureSettings(max_epochs=2.0), 20
        )
        assert (tokens, mixture.rows[0].epochs, mixture.warnings) == (20 * filled, pytest.approx(2.0), ())


@given(
    st.dictionaries(
        st.sampled_from(["en", "zh", "sw", "ha"]),
        st.tuples(st.integers(1, 10_000), st.integers(1, 128)),
        min_size=1,
    ),
    st.integers(1, 100_000),
    st.sampled_from([0.5, 2.0, 1000.0]),
)
def test_the_windows_of_a_stage_hold_its_tokens(datasets, windows, max_epochs):
    """Each dataset's tokens, read in its windows, are so many windows; all together are
    those of the stage.
    """
    supplies = {(code, "web"): Supply(count * filled, count) for code, (count, filled) in datasets.items()}
    mixture, tokens = make_mixture_of_steps(supplies, MixtureSettings(max_epochs=max_epochs), windows)
    read = sum(
        row.share * tokens / supplies[row.language, row.kind].tokens_per_window for row in mixture.rows
    )
    assert read == pytest.approx(windows, rel=0.01, abs=1)
