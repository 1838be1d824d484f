"""`babel status`: the words that the scripts for pods look for."""

import json

from babel_jax.cli import main

STEP = {"step": 0, "stage": "one", "loss": 2.0, "gradient_norm": 1.0}


def test_a_run_is_finished_with_its_summary(tmp_path, capsys):
    def said():
        status = main(["status", str(tmp_path)])
        output = capsys.readouterr()
        return status, output.out + output.err

    assert said() == (0, f"not finished: no step in {tmp_path} yet\n")
    lines = [STEP, STEP | {"step": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert said() == (0, f"not finished: 2 steps in {tmp_path}\n")
    summary = {"out": "x", "hf": "x/hf", "bits_per_byte": {}, "summary": "a table"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert said() == (0, f"finished: 2 steps in {tmp_path}\n")
    (tmp_path / "summary.json").write_text(json.dumps(summary)[:20])
    status, output = said()
    assert status == 2
    assert output.startswith(f"babel: {tmp_path}/summary.json")
    assert output.count("\n") == 1
