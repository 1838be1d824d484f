"""Stand-ins for gcloud, kubectl, Slurm and babel. They note their calls, and say what a test wants."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
POD = ("--name", "my-pod", "--project", "my-project", "--zone", "my-zone")
PLACE = ["--project=my-project", "--zone=my-zone"]
KIND = ("--type", "v5p-128", "--runtime", "v2-alpha-tpuv5", "--no-rehearsal")
RUN = ("--config", "/data/my run.toml", "--out", "/data/it's $HOME")
JOBSET = (
    *(
        "--name",
        "run",
        "--context",
        "my-cluster",
        "--image",
        "registry/babel:1",
        "--accelerator",
        "tpu-v5p-slice",
    ),
    *("--topology", "4x4x4", "--chips", "4", "--hosts", "16", "--slices", "2", "--claim", "disk"),
    *("--config", '/data/a "b".toml', "--out", "/data/o p", "--no-rehearsal"),
)

# Notes its arguments, and answers with the next line of the first file in `answers` whose name is among them.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
name, folder = Path(sys.argv[0]).name, Path(os.environ["STAND_IN"])
with open(folder / "calls", "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if "create" in sys.argv and "STAND_IN_SHOWS" in os.environ:
    (folder / "shown").write_text(Path(os.environ["STAND_IN_SHOWS"]).read_text())
if "create" in sys.argv and (folder / "stderr").is_file():
    print((folder / "stderr").read_text(), file=sys.stderr)
manifest = sys.stdin.read() if "--filename=-" in sys.argv else ""
(folder / "manifest").write_text(manifest) if manifest else None
for answers in sorted((folder / "answers").iterdir()):
    if answers.name in (name, *sys.argv) or any(answers.name in word for word in sys.argv):
        first, _, rest = answers.read_text().partition("\\n")
        answers.write_text(rest)
        status, _, text = first.partition(" ")
        print(text, end="\\n" if text else "")
        sys.exit(int(status or 0))
"""


@pytest.fixture
def call(tmp_path):
    """Runs a script in an empty home; gives what it ended with, and the commands that it called."""
    commands, state = tmp_path / "bin", tmp_path / "state"
    (state / "answers").mkdir(parents=True)
    commands.mkdir()
    for name in ("gcloud", "kubectl", "sbatch", "squeue", "scancel", "srun", "scontrol", "babel"):
        (commands / name).write_text(STAND_IN)
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "STAND_IN": str(state),
    }

    def run(script, *arguments, answers=None, **variables):
        for name, lines in (answers or {}).items():
            (state / "answers" / name).write_text("".join(f"{line}\n" for line in lines))
        (state / "calls").write_text("")
        command = [SCRIPTS / script, *map(str, arguments)]
        ended = subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=60
        )
        return ended, [json.loads(line) for line in (state / "calls").read_text().splitlines()]

    run.state = state
    return run
