"""Every JSON file of a run folder, damaged: one line, or a page without it, never a traceback."""

import json
import shutil

import pytest

from babel_jax import run_files
from babel_jax.cli import main
from babel_jax.errors import BadInput
from babel_jax.training.run_state import read_json_lines

FILES = [
    "mixture.json",
    "goodput.json",
    "samples.json",
    "samples-parent.json",
    "summary.json",
    "evaluation/base.json",
    "evaluation/continued.json",
    "evaluation/items/continued.json",
    "evaluation/during.jsonl",
    "evaluation/best.json",
    "metrics.jsonl",
    "hf/config.json",
]


def other_types(value):
    """The same structure with every number as text, every list as a number, and every text as a list."""
    if isinstance(value, dict):
        return {name: other_types(one) for name, one in value.items()}
    return [value] if isinstance(value, str) else str(value) if isinstance(value, int | float) else 7


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2].rstrip("\n"),
    "a number": lambda text: "5\n",
    "empty values": lambda text: "{}\n",
    "other types": lambda text: (
        "".join(json.dumps(other_types(json.loads(line))) + "\n" for line in text.splitlines())
        if text.startswith('{"')
        else json.dumps(other_types(json.loads(text))) + "\n"
    ),
    "deep": lambda text: '{"a":' * 5000 + "1" + "}" * 5000 + "\n",
    "no text": lambda text: "\udcff\udcfe",
    "half of a pair": lambda text: '{"a": "\\ud800"}\n',
}


@pytest.fixture(scope="module")
def run(grown, tmp_path_factory):
    return shutil.copytree(
        grown["out"],
        tmp_path_factory.mktemp("damaged") / "run",
        ignore=shutil.ignore_patterns("checkpoints", "tensorboard"),
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_the_report_of_a_damaged_run_folder(run, capsys, tmp_path, name, damage):
    file = run / name
    before = file.read_bytes()
    try:
        file.write_text(DAMAGES[damage](before.decode()), encoding="utf-8", errors="surrogateescape")
        status = main(["report", str(run), "--out", str(tmp_path / "page.html")])
        error = capsys.readouterr().err
        assert status in (0, 2)
        assert "Traceback" not in error
        if status == 2:
            assert error.splitlines()[-1].startswith("babel: ")
            assert name.rpartition("/")[2] in error
            assert error.count("babel: ") == 1
    finally:
        file.write_bytes(before)


def test_a_damaged_line_within_the_metrics_is_not_the_end_of_them(run, tmp_path):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines) + lines[-1][:40])
    assert len(read_json_lines(path)) == len(lines)
    path.write_bytes(b"".join([*lines[:2], lines[2][:40] + b"\n", *lines[3:]]))
    with pytest.raises(BadInput, match=r"metrics\.jsonl:3: "):
        read_json_lines(path)


def test_the_last_lines_are_those_of_the_whole(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "_FIRST_READ_BYTES", 16)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    path = tmp_path / "metrics.jsonl"
    for content in (b"", b"".join(lines), b"".join(lines) + lines[-1][:40], lines[0], lines[0][:-1]):
        path.write_bytes(content)
        whole = run_files.read_lines(path, run_files.StepLine)
        for most in (1, 3, 1_000):
            assert run_files.read_last_lines(path, run_files.StepLine, most) == whole[-most:]
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40] + b"\n")
    with pytest.raises(BadInput, match=r"metrics\.jsonl: one of the last lines"):
        run_files.read_last_lines(path, run_files.StepLine, 2)
    assert run_files.read_last_lines(tmp_path / "none", run_files.StepLine, 2) == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("goodput.json", {"until": 1e300}),
        ("goodput.json", {"seconds": {"step": 1e308, "setup": 1e308}}),
        ("evaluation/continued.json", {"tasks": {"<script>": {"<blink>": {"score": 1.0, "n": 1}}}}),
    ],
)
def test_the_report_of_values_that_no_run_has(run, capsys, tmp_path, name, changes):
    file = run / name
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | changes))
        status = main(["report", str(run), "--out", str(tmp_path / "page.html")])
        assert status in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
        if status == 0:
            assert "<blink>" not in (tmp_path / "page.html").read_text().partition("<body")[2]
    finally:
        file.write_text(before)
