"""Measuring between steps: what is written, which state is kept, and that nothing else changes."""

import json

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from babel_jax.training import run
from babel_jax.training.deepening import Depth
from babel_jax.training.run import train_stages
from babel_jax.training.run_state import read_json_lines
from babel_jax.training.watch import Watch

# The mean of bits per byte after so many steps; the best is neither the newest nor a multiple of
# checkpoint_every.
SCORES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 1.0}


def results(mean):
    return {
        "bits_per_byte": {
            code: {"score": mean + more, "stderr": None, "n": 1} for code, more in (("en", 0.5), ("sw", -0.5))
        }
    }


@pytest.fixture
def watched(run_config, begin):
    """Trains a folder of ten steps that is measured every two; gives the parameters at the end and the steps
    measured.
    """

    def go(folder, every=2):
        measured = []
        folder.mkdir(exist_ok=True)

        def measure(step, config, params):
            measured.append((step, np.asarray(params["model"]["norm"]["weight"])))
            return results(SCORES[step])

        config = run_config(folder)
        shape = config.model.shape
        watch = Watch(folder, every, measure)
        return train_stages(
            config, [Depth(0, shape, ())], lambda: begin(shape), folder, lambda *_: None, watch
        ), measured

    return go


def kept(folder):
    return {int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()}


def test_the_best_state_is_named_and_kept_and_training_is_the_same(watched, tmp_path, monkeypatch):
    programs = []
    monkeypatch.setattr(
        run,
        "_program",
        lambda *arguments, make=run._program: programs.append(make(*arguments)) or programs[-1],
    )
    params, measured = watched(tmp_path / "watched")
    assert [step for step, _ in measured] == list(SCORES)
    assert len(programs) == 10
    assert len(set(map(id, programs))) == 1
    assert json.loads((tmp_path / "watched/evaluation/best.json").read_text()) == {
        "step": 4,
        "bits_per_byte": 1.0,
        "checkpoint": "checkpoints/4",
    }
    assert kept(tmp_path / "watched") == {4, 9, 10}
    lines = read_json_lines(tmp_path / "watched/evaluation/during.jsonl")
    assert lines == [{"step": step, "tasks": results(mean)} for step, mean in SCORES.items()]

    board = EventAccumulator(str(tmp_path / "watched" / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("evaluation/bits_per_byte/mean")] == list(
        SCORES.items()
    )
    assert board.Scalars("evaluation/bits_per_byte/sw")[0].value == 2.5

    alone, none = watched(tmp_path / "alone", every=None)
    assert none == []
    assert not (tmp_path / "alone" / "evaluation").exists()
    jax.tree.map(np.testing.assert_array_equal, params, alone)


def test_a_run_that_was_stopped_measures_again_from_where_it_goes_on(watched, tmp_path, cut_off):
    cut_off(7, lambda: watched(tmp_path))
    # Saved were 2 and 4, as the best so far, and 6; what was measured later than that is measured again.
    lines = read_json_lines(tmp_path / "evaluation" / "during.jsonl")
    (tmp_path / "evaluation" / "during.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 8, "tasks": {}}])
    )
    _, measured = watched(tmp_path)
    assert [step for step, _ in measured] == [8, 10]
    assert [line["step"] for line in read_json_lines(tmp_path / "evaluation" / "during.jsonl")] == list(
        SCORES
    )
    assert json.loads((tmp_path / "evaluation" / "best.json").read_text())["step"] == 4
    assert 4 in kept(tmp_path)
