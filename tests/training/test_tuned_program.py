"""`babel tune` measures the program that a run executes."""

import pytest

from babel_jax.training import run
from babel_jax.training.deepening import Depth
from babel_jax.tuning import bench
from babel_jax.tuning.bench import Bench, Failed
from babel_jax.tuning.candidates import candidate_of


class Lowered(Exception):
    """Raised in place of compiling."""


def test_the_measured_program_is_the_runs(run_config, train_at, tmp_path, monkeypatch):
    texts = []

    def keep(lowered, changes):
        texts.append(lowered.as_text())
        raise Lowered

    for module in (run, bench):
        monkeypatch.setattr(module, "compiled_by_all", keep)
    # A real config names its languages by its sources.
    languages = [{"code": code} for code in ("en", "zh", "sw", "ha")]
    changes = {"training": {"gradient_accumulation": 2, "remat": "gate"}, "languages": languages}
    with pytest.raises(Lowered):
        train_at(tmp_path / "run", **changes)
    config = run_config(tmp_path / "run", **changes)
    with pytest.raises(Failed, match="Lowered"):
        Bench(config.stages[-1], Depth(0, config.model.shape, ())).visit(candidate_of(config, {}), 1)
    assert texts[0] == texts[1]
