"""When a run saves by the clock, and where its time went."""

import contextlib
import json
import signal

import pytest

from babel_jax.distributed.stopping import SaveTimes, preempted_by_sigterm
from babel_jax.errors import Preempted
from babel_jax.training.goodput import Goodput, Spent, goodput_of


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def saved(every, minutes, seconds_a_step):
    clock = Clock()
    times = SaveTimes(0, every, minutes, clock)
    found = []
    for step, seconds in enumerate(seconds_a_step, start=1):
        clock.now += seconds
        if times.due(step):
            found.append(step)
    return found


def test_saves_by_steps_and_by_minutes():
    assert saved(4, None, [100.0] * 10) == [4, 8]
    assert saved(1000, 1.0, [25.0] * 10) == [3, 6, 9]
    # The clock begins anew with every save.
    assert saved(5, 1.0, [25.0] * 10) == [3, 5, 8, 10]


def test_several_processes_ask_the_first_seldom_and_all_save_after_the_same_step(monkeypatch):
    """Process 0's clock is the true one; another's runs away.

    What process 0 answers is replayed to it, as a broadcast does.
    """
    monkeypatch.setattr("babel_jax.distributed.stopping.jax.process_count", lambda: 2)
    asked = []

    def run(answer, rate):
        clock = Clock()
        monkeypatch.setattr("babel_jax.distributed.stopping._of_first", answer)
        times, found = SaveTimes(0, 10**9, 10.0, clock), []
        for step in range(1, 2001):
            clock.now += rate * (1.0 if step < 1000 else 3.0)
            if times.due(step):
                found.append(step)
        return found

    first = run(lambda wait: asked.append(wait) or wait, 1.0)
    answers = iter(asked)
    assert run(lambda _: next(answers), 17.0) == first
    # Every 600 s: after 600 steps of 1 s, and then 200 of 3 s; found at the latest as many steps late as were
    # foreseen to be left, halved.
    gaps = [after - before for before, after in zip([0, *first], first, strict=False)]
    assert gaps[0] == 600
    assert all(abs(gap - 200) <= 2 for gap in gaps[2:])
    assert len(asked) < 12 * len(first)


def test_sigterm_outside_of_steps():
    before = signal.getsignal(signal.SIGTERM)
    # As around damaged files: it is not taken for an error of theirs.
    with pytest.raises(Preempted), preempted_by_sigterm(), contextlib.suppress(Exception):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_goodput_over_a_restart(tmp_path):
    clock, path = Clock(), tmp_path / "goodput.json"

    def pass_(seconds):
        clock.now += seconds

    first = Goodput(path, clock)
    pass_(10)
    with first.spent(Spent.STEP):
        pass_(50)
        with first.spent(Spent.DATA):
            pass_(5)
        pass_(15)
    first.save(7)
    pass_(3)  # killed before it is written
    clock.now += 17
    second = Goodput(path, clock)
    second.lose({6: 8.0, 7: 12.0, 8: 100.0})
    with second.spent(Spent.STEP):
        pass_(100)
    second.save(9)
    expected = {"setup": 10, "step": 50 + 15 - 20 + 100, "data": 5, "lost": 20, "down": 20}
    found = json.loads(path.read_text())["seconds"]
    assert {name: seconds for name, seconds in found.items() if seconds} == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(clock.now - 1000)
    assert second.fraction() == pytest.approx(145 / 200)
    assert goodput_of(path)["lost"] == pytest.approx(0.1)
    assert goodput_of(tmp_path / "none.json") is None


def test_goodput_is_written_seldom(tmp_path):
    clock, path = Clock(), tmp_path / "goodput.json"
    goodput = Goodput(path, clock)
    clock.now += 29
    goodput.save(1, at_most_every=30)
    assert not path.exists()
    clock.now += 2
    goodput.save(2, at_most_every=30)
    assert json.loads(path.read_text())["last_step"] == 2
