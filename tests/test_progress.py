"""Progress without a terminal: a line after five seconds, and then one each minute."""

import logging

import pytest

from babel_jax import progress
from babel_jax.progress import Work, look, under_way, working


@pytest.fixture
def clock(monkeypatch, caplog):
    """A clock that is set by hand; no thread looks."""
    seconds = [1000.0]
    monkeypatch.setattr(progress, "_clock", lambda: seconds[0])
    monkeypatch.setattr(progress, "_last_line", float("-inf"))
    monkeypatch.setattr(progress._Pulse, "start_if_none", classmethod(lambda cls: None))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    caplog.set_level(logging.INFO, "babel")

    def passes(more):
        seconds[0] += more
        before = len(caplog.messages)
        look()
        return caplog.messages[before:]

    return passes


def test_a_line_after_five_seconds_and_then_each_minute(clock):
    with Work("reading sw", total=3000, unit="rows") as work:
        assert clock(4.0) == []
        work.update(1000)
        assert clock(1.0) == ["reading sw: 1,000 of 3,000 rows, 0:00:05 so far, 0:00:10 left"]
        assert clock(59.0) == []
        work.update(1000)
        assert clock(1.0) == ["reading sw: 2,000 of 3,000 rows, 0:01:05 so far, 0:00:32 left"]
    assert clock(120.0) == []


def test_work_in_other_work_tells_of_the_inner_one(clock, monkeypatch):
    # Work of other tests that was never closed.
    monkeypatch.setattr(progress, "_active", [])
    with Work("prepare", total=3, unit="languages") as outer, working("training the tokenizer"):
        assert clock(6.0) == [
            "training the tokenizer: 0:00:06 so far",
            "prepare: 0 of 3 languages, 0:00:06 so far",
        ]
        assert clock(60.0) == ["training the tokenizer: 0:01:06 so far"]
        outer.update()
        assert under_way() == "prepare, 1 of 3 languages"
    assert under_way() == ""


def test_rows_are_counted_as_they_are_done(clock):
    work = Work("reading", range(3), unit="rows")
    seen = [(row, work.done) for row in work]
    assert seen == [(0, 0), (1, 1), (2, 2)]
    assert (work.done, work.total) == (3, 3)


def test_nothing_is_shown_of_other_processes(clock):
    with Work("reading", total=3, unit="rows", shown=False):
        assert clock(100.0) == []
