"""The number of updates skipped in a row, as a run reads it to decide whether to stop."""

import numpy as np

from babel_jax.languages import BABEL
from babel_jax.training.goodput import Goodput
from babel_jax.training.metrics import Metrics


def values(skipped):
    by_language = np.zeros(len(BABEL), np.float32)
    by_language[0] = 8
    return {
        "loss": np.float32(np.nan),
        "gradient_norm": np.float32(np.nan),
        "skipped": np.int32(skipped),
        "tokens": by_language,
        "targets": by_language,
        "nats": by_language,
    }


def test_a_second_flush_of_the_same_step_gives_the_same_number(tmp_path):
    """An evaluation flushes, and then a checkpoint syncs: the run still has to see that it must stop."""
    with Metrics(tmp_path, 8, {"en": 8}, 0, 3, Goodput(tmp_path / "goodput.json"), BABEL) as metrics:
        assert metrics.log(0, "first", 1e-3, values(1)) == 0
        assert metrics.log(1, "first", 1e-3, values(2)) == 1
        assert (metrics.flush(), metrics.flush(), metrics.sync()) == (2, 2, 2)
        assert metrics.log(2, "first", 1e-3, values(0)) == 2
        assert metrics.flush() == 0
