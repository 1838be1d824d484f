import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.data.sources.rows import Row
from babel_jax.data.windows.survey import survey
from babel_jax.draws import Purpose, unit_draw
from babel_jax.errors import BadInput

rows_strategy = st.lists(
    st.builds(
        Row,
        id=st.integers(0, 40).map(str),
        text=st.sampled_from("abcdefghijklmnopqrstuvwxyz"),
        kind=st.sampled_from(["web", "textbook"]),
    ),
    max_size=60,
)


def drawn(identifier):
    return unit_draw(Purpose.HELDOUT, identifier)


def training(surveyed, rows):
    return [row for kind in surveyed.documents for row in surveyed.training_rows(rows, kind)]


@given(rows_strategy, st.floats(0, 1), st.integers(1, 20))
def test_every_row_is_trained_on_held_out_or_left_out_for_a_reason(rows, fraction, wanted):
    surveyed = survey(rows, fraction, wanted)
    trained = training(surveyed, rows)
    assert len(surveyed.fates) == len(rows)
    assert len(trained) + len(
        surveyed.heldout
    ) + surveyed.duplicates + surveyed.overlaps + surveyed.reserved == len(rows)
    trained_texts, heldout_texts = [row.text for row in trained], [row.text for row in surveyed.heldout]
    assert len(set(trained_texts)) == len(trained_texts)
    assert len(set(heldout_texts)) == len(heldout_texts)
    assert not set(trained_texts) & set(heldout_texts)
    assert all(drawn(row.id) >= fraction for row in trained)
    assert sum(map(len, heldout_texts[:-1])) < wanted
    assert [drawn(row.id) for row in surveyed.heldout] == sorted(drawn(row.id) for row in surveyed.heldout)


@given(rows_strategy, st.floats(0.01, 1))
def test_one_of_several_texts_is_held_out(rows, fraction):
    surveyed = survey(rows, fraction, 1000)
    assert bool(surveyed.heldout) == (
        len({row.text for row in rows}) > 1 or any(drawn(row.id) < fraction for row in rows)
    )


def test_the_same_parallel_rows_are_held_out_in_every_language():
    short = [Row(str(number), f"x{number}", "web") for number in range(200)]
    long = [Row(str(number), f"a much longer text {number}" * 9, "web") for number in reversed(range(200))]
    one, other = survey(short, 0.2, 100), survey(long, 0.2, 100)
    # The long texts fill their hundred bytes sooner; what is held out in either is trained on in neither.
    assert [row.id for row in other.heldout] == [row.id for row in one.heldout][: len(other.heldout)]
    heldout = {row.id for row in one.heldout}
    assert not heldout & {row.id for row in training(one, short)}
    assert not heldout & {row.id for row in training(other, long)}


def test_nothing_is_held_out_when_nothing_shall_be():
    rows = [Row(str(number), str(number), "web") for number in range(50)]
    assert training(survey(rows, 0.0, 100), rows) == rows


def test_ids_hash_evenly():
    places = np.sort([drawn(f"message-{number}") for number in range(2000)])
    assert np.abs(places - np.linspace(0, 1, 2000)).max() < 0.04


def test_text_that_changes_between_the_readings_is_noticed():
    rows = [Row(str(number), str(number), "web") for number in range(5)]
    surveyed = survey(rows, 0.0, 1)
    for changed in (rows[:4], [*rows, rows[0]]):
        with pytest.raises(BadInput, match="changed between its first and its second reading"):
            list(surveyed.training_rows(changed, "web"))


@given(
    st.lists(st.text(max_size=8), max_size=40, unique=True),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([1, 20, 10_000]),
)
def test_of_distinct_rows_nothing_need_be_remembered(texts, fraction, wanted):
    rows = [
        Row(f"id {number % 30}", text, "web" if number % 3 else "textbook")
        for number, text in enumerate(texts)
    ]
    assert survey(rows, fraction, wanted, are_distinct=True) == survey(rows, fraction, wanted)
