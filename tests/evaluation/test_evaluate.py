"""`evaluate` on the items of the fixtures: what it gives and writes."""

import csv
import json

import pytest

from babel_jax.evaluate import Request, evaluate

TASKS = ("mmmlu", "m3exam", "xcopa", "mgsm", "xnli", "flores200")


@pytest.fixture(scope="module")
def compared(tiny_folder, benchmarks, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    request = Request(tasks=("all",), data=benchmarks, few_shot=1)
    return evaluate(str(tiny_folder()), [str(tiny_folder(seed=1))], request, out), out


def test_all_benchmarks_and_a_baseline(compared, tiny_folder):
    found, out = compared
    assert tuple(found["tasks"]) == TASKS
    print(found["summary"])
    assert found["tasks"]["mmmlu"].keys() == {"sw"}
