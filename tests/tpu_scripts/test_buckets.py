"""The scripts for pods with runs in buckets, rehearsals, and secrets by name."""

import base64
import os
import shlex
import subprocess

import pytest

from babel_jax.commands.parser import BabelParser
from tests.tpu_scripts.conftest import JOBSET, KIND, PLACE, POD

POD_KIND = KIND[:-1]  # with a rehearsal
OUT, DATA = "gs://bucket/runs/it's mine", "gs://bucket/data"
SLURM = ("launch", "--name", "run", "--nodes", "2", "--gpus", "8")
GKE = (*JOBSET[: JOBSET.index("--claim")], "--service-account", "trainer")
FAKE_VALUE = "c2VjcmV0IHZhbHVl/+=x"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "my run.toml"
    path.write_text('# "quoted" $HOME\nout = "runs/x"\n')
    return path


@pytest.fixture
def commands(tmp_path):
    """A folder of commands, which a test adds to, and the environment that finds them first."""
    folder = tmp_path / "commands"
    folder.mkdir()

    def add(name, text):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    add.environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return add


def in_shell(command, commands, folder):
    """What the script hands to ssh, run here."""
    words = command.removeprefix("--command=").replace("nohup setsid", "nohup").removesuffix("&")
    return subprocess.run(
        ["bash", "-c", words], cwd=folder, env=commands.environment, capture_output=True, text=True
    )


def worker(tmp_path, commands, text):
    """A worker's folder, with a `babel` that runs this text."""
    babel = tmp_path / "worker" / "babel-jax" / ".venv" / "bin" / "babel"
    babel.parent.mkdir(parents=True)
    babel.write_text(f"#!/bin/bash\n{text}\n")
    babel.chmod(0o755)
    return tmp_path / "worker"


def script_calls(config):
    """How each script begins a run in a bucket, with a rehearsal."""
    run = ("--config", config, "--out", OUT, "--data", DATA)
    more = ("--", "--profile", "10:13", "--set", "seed=1", "--set=optimizer.z_loss=0.1")
    return {
        "tpu_vm.sh": ("create", *POD, *POD_KIND, "--slices", "2", *run, *more),
        "gke.sh": ("create", *GKE, *run, *more),
        "slurm.sh": (*SLURM, *run, *more),
    }


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sh"])
def test_the_rehearsal_comes_first_and_nothing_is_begun_where_it_fails(call, config, script):
    arguments = script_calls(config)[script]
    ended, calls = call(script, *arguments)
    assert ended.returncode == 0, ended.stderr
    slices = [] if script == "slurm.sh" else ["--slices", "2"]
    settings = ["--set", f"out={OUT}", "--set", f"data.folder={DATA}"]
    rehearsal = ["babel", "rehearse", str(config), *settings, *slices]
    assert calls[0] == [*rehearsal, "--set", "seed=1", "--set=optimizer.z_loss=0.1"]
    options = BabelParser().parse_args(calls[0][1:])
    assert options.set == [f"out={OUT}", f"data.folder={DATA}", "seed=1", "optimizer.z_loss=0.1"]
    assert len(calls) == 2

    ended, calls = call(script, *arguments, answers={"rehearse": ["2 "]}, BABEL_RECORD="/dev/null")
    assert (ended.returncode, len(calls)) == (2, 1)
    assert "the rehearsal did not pass, so nothing is started" in ended.stderr
    place = arguments.index("--out")
    _, calls = call(script, *arguments[:place], "--no-rehearsal", *arguments[place:])
    assert [words[0] for words in calls] == [{"t": "gcloud", "g": "kubectl", "s": "sbatch"}[script[0]]]
    _, calls = call(script, *arguments[:place], "--devices", "4", *arguments[place:])
    assert calls[0][calls[0].index("--devices") + 1] == "4"
    dry, calls = call(script, *arguments[:place], "--dry-run", *arguments[place:])
    assert calls == []
    assert shlex.split(dry.stdout.splitlines()[0])[:3] == rehearsal[:3]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sh"])
def test_what_cannot_be_rehearsed_here_is_said(call, config, script):
    arguments = list(script_calls(config)[script])
    place = arguments.index("--out")
    ended, calls = call(script, *arguments[:place], "--babel", "no-such-babel", *arguments[place:])
    assert (ended.returncode, calls) == (2, [])
    assert "no-such-babel: not on this machine, where the rehearsal runs" in ended.stderr
    arguments[arguments.index("--config") + 1] = "/data/run.toml"
    if script == "gke.sh":
        arguments[1:1] = ["--claim", "disk"]
    ended, calls = call(script, *arguments)
    assert (ended.returncode, calls) == (2, [])
    assert "--config /data/run.toml: no file of this machine, where the rehearsal runs" in ended.stderr


def test_resume_rehearses_what_it_creates_first_and_never_again(call, config):
    run = ("--config", config, "--out", OUT, "--poll", "0")
    answers = {"describe": ["0 GONE"], "rehearse": ["2 "]}
    ended, calls = call("tpu_vm.sh", "resume", *POD, *POD_KIND, *run, answers=answers)
    assert (ended.returncode, [words[0] for words in calls]) == (2, ["babel"])
    call("tpu_vm.sh", "create", *POD, *KIND)
    answers = {"describe": ["0 PREEMPTED", *["0 READY"] * 4], "--worker=0": ["0 finished"]}
    ended, calls = call("tpu_vm.sh", "resume", *POD, *POD_KIND, *run, answers=answers)
    assert ended.returncode == 0, ended.stderr
    assert not [words for words in calls if words[0] == "babel"]
    assert [words[4] for words in calls if words[4] != "describe"][:2] == ["delete", "create"]


def test_a_config_of_this_machine_is_what_runs_on_all_workers(call, config, tmp_path, commands):
    secrets = ("--secrets", "AWS_ACCESS_KEY_ID=key-id,AWS_SECRET_ACCESS_KEY=key_1")
    run = ("--config", config, "--out", OUT, "--data", DATA, *secrets)
    ended, calls = call("tpu_vm.sh", "launch", *POD, *run, "--", "--set", "seed=1")
    assert ended.returncode == 0, ended.stderr
    *described, copied, (*_, command) = calls
    secret = ["gcloud", "secrets", "describe"]
    assert described == [[*secret, name, "--project=my-project"] for name in ("key-id", "key_1")]
    assert copied[4:] == ["scp", str(config), "my-pod:babel-run.toml", *PLACE, "--worker=all"]
    asks = "secrets versions access latest --secret=%s --project=my-project"
    commands("gcloud", f'[[ "$*" == "{asks % "key-id"}" || "$*" == "{asks % "key_1"}" ]] && echo "of $5"')
    say = 'printf "%s\\n" "$@" "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY"'
    folder = worker(tmp_path, commands, say)
    assert in_shell(command, commands, folder).returncode == 0
    words = [
        "train",
        "babel-run.toml",
        "--set",
        f"out={OUT}",
        "--set",
        f"data.folder={DATA}",
        "--set",
        "seed=1",
    ]
    assert (folder / "babel.log").read_text().splitlines() == [
        *words,
        "of --secret=key-id",
        "of --secret=key_1",
    ]
    BabelParser().parse_args(words)


@pytest.mark.parametrize(
    ("says", "left", "found"),
    [
        ("finished: 8 steps in x", None, "finished"),
        ("not finished: 6 steps in x", "143", "143"),
        ("", "1", "1"),
        ("not finished: no step in x yet", None, "lost"),
    ],
)
def test_progress_of_a_run_in_a_bucket(call, tmp_path, commands, says, left, found):
    """What `resume` asks worker 0, run by a shell: `babel status` says whether the run is finished."""
    call("tpu_vm.sh", "create", *POD, *KIND)
    answers = {"describe": ["0 the secret", "0 READY"], "--worker=0": ["0 finished"]}
    run = ("--config", "/data/run.toml", "--out", OUT, "--secrets", "AWS_PROFILE=name", "--poll", "0")
    ended, calls = call("tpu_vm.sh", "resume", *POD, *KIND, *run, answers=answers)
    assert ended.returncode == 0, ended.stderr
    (look,) = [words[-1] for words in calls if "--worker=0" in words]
    commands("gcloud", "echo profile")
    commands("pgrep", "exit 1")
    folder = worker(
        tmp_path, commands, f'[[ "$*" == "status {OUT}" && $AWS_PROFILE == profile ]] && echo "{says}"'
    )
    if left is not None:
        (folder / "babel.status").write_text(f"{left}\n")
    assert in_shell(look, commands, folder).stdout == f"{found}\n"


def test_gke_with_all_in_buckets(call, config, commands, tmp_path):
    yaml = pytest.importorskip("yaml")
    run = ("--config", config, "--out", OUT, "--data", DATA)
    secrets = ("--secrets", "s3-keys,more.keys")
    ended, _ = call("gke.sh", "create", *GKE, *run, *secrets)
    assert ended.returncode == 0, ended.stderr
    found = yaml.safe_load((call.state / "manifest").read_text())
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "trainer"
    assert "volumes" not in pod
    (container,) = pod["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": name}} for name in ("s3-keys", "more.keys")]
    (given,) = container["env"]
    assert base64.b64decode(given["value"]) == config.read_bytes()
    said = tmp_path / "said"
    commands(
        "babel",
        f'printf "%s\\n" "$@" >>"{said}"\nif [[ $1 == status ]]; then cat "{tmp_path}/state-of-run"; fi',
    )
    container["command"][2] = container["command"][2].replace(
        "/tmp/babel-run.toml", str(tmp_path / "there.toml")
    )
    environment = commands.environment | {given["name"]: given["value"]}
    for state, status in (("finished: 8 steps", 0), ("not finished: 6 steps", 1)):
        (tmp_path / "state-of-run").write_text(f"{state}\n")
        assert subprocess.run(container["command"], env=environment, check=False).returncode == status
    assert (tmp_path / "there.toml").read_bytes() == config.read_bytes()
    words = ["train", str(tmp_path / "there.toml"), "--set", f"out={OUT}", "--set", f"data.folder={DATA}"]
    assert said.read_text().splitlines() == [*words, "status", OUT] * 2
    # On a disk of the cluster is what is not in a bucket.
    for other in (("--out", "/data/o"), ("--data", "/data/d"), ("--config", "/data/c.toml")):
        ended, calls = call("gke.sh", "create", *GKE, *run, *other, "--no-rehearsal")
        assert (ended.returncode, calls) == (2, [])
        assert "--claim is needed" in ended.stderr


def test_slurm_with_a_run_in_a_bucket(call, config):
    run = ("--config", config, "--out", OUT, "--data", DATA, "--no-rehearsal", "--secrets", "KEY,TOKEN")
    ended, calls = call("slurm.sh", *SLURM, *run, KEY=FAKE_VALUE)
    assert (ended.returncode, calls) == (2, [])
    assert "--secrets: TOKEN is not set here" in ended.stderr
    ended, (submitted,) = call("slurm.sh", *SLURM, *run, KEY=FAKE_VALUE, TOKEN="t")
    *options, script, babel, _, folder = submitted[: submitted.index("--set")]
    rest = submitted[submitted.index("--set") :]
    assert {"--export=ALL,KEY,TOKEN", "--output=run.slurm.log"} <= set(options)
    assert FAKE_VALUE not in str(options)
    assert rest == ["--set", f"data.folder={DATA}"]
    ended, calls = call("slurm.sh", "log", "--out", OUT, "--name", "run", "--dry-run")
    assert shlex.split(ended.stdout)[-1] == "run.slurm.log"
    ended, calls = call("slurm.sh", "log", "--out", OUT, "--dry-run")
    assert (ended.returncode, ended.stdout) == (2, "")
    job = (script, babel, config, folder, *rest)
    for state, requeued in (("finished: 8 steps", False), ("not finished: 6 steps", True)):
        answers = {"srun": ["0 "], "status": [f"0 {state}"]}
        ended, calls = call(*job, answers=answers, SLURM_JOB_ID="77")
        assert calls[1] == ["babel", "status", OUT]
        assert [words[0] for words in calls[2:]] == (["scontrol"] if requeued else [])


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("tpu_vm.sh", ("launch", *POD, "--secrets", f"KEY=name,{FAKE_VALUE}")),
        ("tpu_vm.sh", ("launch", *POD, "--secrets", f"KEY=name,OTHER={FAKE_VALUE}")),
        ("gke.sh", ("create", *GKE, "--secrets", f"name,KEY={FAKE_VALUE}")),
        ("slurm.sh", (*SLURM, "--secrets", f"KEY,OTHER={FAKE_VALUE}")),
    ],
)
def test_a_value_in_place_of_a_secrets_name_is_refused_and_not_printed(call, config, script, arguments):
    ended, calls = call(script, *arguments, "--config", config, "--out", OUT)
    assert (ended.returncode, calls) == (2, [])
    assert "--secrets: entry 2 is not" in ended.stderr
    assert FAKE_VALUE not in ended.stdout + ended.stderr


def test_a_secret_that_is_not_there_is_said_before_anything_is_launched(call, config):
    run = ("--config", config, "--out", OUT, "--secrets", "KEY=a-value-it-may-be")
    ended, calls = call("tpu_vm.sh", "launch", *POD, *run, answers={"secrets": ["1 "]})
    assert (ended.returncode, len(calls)) == (2, 1)
    assert "no secret of the name given for KEY" in ended.stderr
    assert "a-value-it-may-be" not in ended.stdout + ended.stderr
