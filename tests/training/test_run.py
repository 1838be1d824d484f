"""The staged run: stopped anywhere, it resumes to the same bits; each fault is said and loses nothing."""

import itertools
import json
import resource
import shutil
import signal
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from babel_jax.data.batches.loading import Batches
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.errors import BadInput, Preempted
from babel_jax.training import metrics, run
from babel_jax.training.deepening import Depth, depths
from babel_jax.training.goodput import goodput_of
from babel_jax.training.metrics import Metrics
from babel_jax.training.resuming import note_text
from babel_jax.training.run import train_stages
from babel_jax.training.run_state import Checkpoints, read_json_lines
from babel_jax.training.stages import plan_stages


@pytest.fixture
def train(run_config, begin):
    """Runs a folder to its end, or until something is raised; gives the parameters and the stages whose end
    was seen.
    """

    def go(folder, params=None, **changes):
        config = run_config(folder, **changes)
        ended = []
        shape = config.model.shape
        last = train_stages(
            config,
            [Depth(0, shape, ())],
            lambda: params or begin(shape),
            folder,
            lambda stage, *_: ended.append(stage.name),
        )
        return last, ended

    return go


@pytest.fixture(scope="module")
def undisturbed(run_config, begin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    config = run_config(folder)
    params = train_stages(
        config, [Depth(0, config.model.shape, ())], lambda: begin(config.model.shape), folder, lambda *_: None
    )
    return folder, jax.device_get(params)


def losses(folder):
    return [
        (line["step"], line["stage"], line["loss"], line["rate"])
        for line in read_json_lines(folder / "metrics.jsonl")
    ]


def tokens_of_steps(config, plan, number=0):
    """The tokens of each step of a stage, counted in its batches: padding has segment 0."""
    settings = config.training.global_batch_size, config.data.seq_len
    batches = Batches(config.data.folder, plan.mixture, *settings, seed=config.seed * 1000 + number)
    return [int((batches[step]["segment_ids"] > 0).sum()) for step in range(plan.end - plan.start)]


def test_metrics_of_every_step(undisturbed, run_config):
    folder, _ = undisturbed
    lines = list(read_json_lines(folder / "metrics.jsonl"))
    config = run_config(folder)
    tokens = [
        count
        for number, plan in enumerate(plan_stages(config))
        for count in tokens_of_steps(config, plan, number)
    ]
    assert [line["tokens"] for line in lines] == tokens
    assert any(count < 4 * 64 for count in tokens)
    assert [(line["step"], line["stage"]) for line in lines] == [
        (step, "first" if step < 6 else "second") for step in range(10)
    ]
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert sum(line["tokens_by_language"].values()) == sum(tokens[: line["step"] + 1])
        assert set(line["loss_by_language"]) <= {"en", "zh", "sw", "ha"}
        assert line["gradient_norm"] > 0
        assert line["skipped"] == 0
    assert list((folder / "tensorboard").iterdir())
    assert set(json.loads((folder / "mixture.json").read_text())) == {"first", "second"}


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6, 9])
def test_a_run_cut_off_goes_on_to_the_same_bits(undisturbed, train, tmp_path, cut_off, stop):
    """As after kill -9: nothing is saved or closed on the way out, but the checkpoints of every third step
    are there.
    """
    folder, params = undisturbed
    cut_off(stop, lambda: train(tmp_path))
    again, ended = train(tmp_path)
    assert losses(tmp_path) == losses(folder)
    assert ended == (["first", "second"] if stop <= 6 else ["second"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), params)


@pytest.mark.parametrize("first", [True, False])
def test_moments_offloaded_to_the_host_give_the_same_bits(undisturbed, train, tmp_path, cut_off, first):
    """A run may be cut off with them there and go on without, and the other way round."""
    folder, params = undisturbed
    cut_off(7, lambda: train(tmp_path, training={"offload_optimizer_state": first}))
    again, _ = train(tmp_path, training={"offload_optimizer_state": not first})
    assert losses(tmp_path) == losses(folder)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), params)


def test_control_c_saves_between_two_steps(undisturbed, train, tmp_path, monkeypatch):
    folder, _ = undisturbed

    def press(self, step, *rest, log=Metrics.log):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return log(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", press)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert (tmp_path / "checkpoints" / "5").is_dir()
    train(tmp_path)
    assert losses(tmp_path) == losses(folder)


def test_accumulated_gradients_are_those_of_the_whole_batch(undisturbed, train, tmp_path):
    folder, params = undisturbed
    again, _ = train(tmp_path, training={"gradient_accumulation": 2})
    np.testing.assert_allclose(
        [line[2] for line in losses(tmp_path)], [line[2] for line in losses(folder)], rtol=1e-4
    )
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=2e-3), jax.device_get(again), params
    )


def test_a_loss_that_stays_not_finite_stops_the_run_with_the_parameters_of_before(
    train, begin, run_config, tmp_path
):
    shape = run_config(tmp_path).model.shape
    params = begin(shape)
    params["model"]["norm"]["weight"] = params["model"]["norm"]["weight"].at[0].set(jnp.nan)
    before = jax.device_get(params)
    with pytest.raises(
        BadInput,
        match=(
            r"stage first: loss or gradient was not finite for 3 steps in a row, up to step \d; lower the "
            r"peak rate"
        ),
    ):
        train(tmp_path, params)
    lines = list(read_json_lines(tmp_path / "metrics.jsonl"))
    assert [line["skipped"] for line in lines[:3]] == [1, 2, 3]
    assert all(line["loss"] is None for line in lines)
    stopped = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    saved = {}

    def keep(*arguments, restore=run.Checkpoints.restore):
        saved["step"], _, saved["state"] = restore(*arguments)
        raise RuntimeError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Checkpoints, "restore", keep)
        with pytest.raises(RuntimeError, match="enough"):
            train(tmp_path)
    assert saved["step"] == stopped
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(saved["state"].params), before)


def cut_arrays(checkpoint):
    for file in checkpoint.rglob("*"):
        if file.is_file() and "d" in file.parts[-2:-1]:
            file.write_bytes(file.read_bytes()[:10])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_arrays, "not the bytes that were written"),
        (lambda checkpoint: shutil.rmtree(checkpoint / "default"), "the digests of its files are missing"),
        (
            lambda checkpoint: (checkpoint / "_CHECKPOINT_METADATA").write_text(""),
            "missing, damaged or of another version",
        ),
    ],
    ids=["arrays cut off", "no arrays", "no metadata"],
)
def test_a_damaged_newest_checkpoint_is_set_aside(undisturbed, train, tmp_path, caplog, damage, reason):
    folder, params = undisturbed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "10")
    again, ended = train(tmp_path)
    assert "checkpoint 10 cannot be read" in caplog.text
    assert reason in caplog.text
    assert (tmp_path / "checkpoints" / "10.damaged").is_dir()
    assert ended == ["second"]
    assert losses(tmp_path) == losses(folder)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), params)


def test_damaged_metadata_of_a_checkpoint_are_named(undisturbed, train, tmp_path, caplog):
    folder, params = undisturbed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "10" / "_CHECKPOINT_METADATA"
    newest.write_text(newest.read_text()[:100])
    again, _ = train(tmp_path)
    assert f"checkpoint 10 cannot be read ({newest}: missing, damaged or of another version" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), params)
    for file in (tmp_path / "checkpoints").rglob(newest.name):
        file.unlink()
    with pytest.raises(
        BadInput,
        match=r"no checkpoint can be read .*/_CHECKPOINT_METADATA: missing, damaged .*remove the run folder",
    ):
        train(tmp_path)


def test_no_readable_checkpoint_is_refused_and_nothing_is_moved(undisturbed, train, tmp_path):
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file() and file.name != "_CHECKPOINT_METADATA":
            file.write_bytes(file.read_bytes()[:10])
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(BadInput, match="no checkpoint can be read"):
        train(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def test_frozen_parameters_stay_to_the_bit(train, begin, run_config, tmp_path):
    before = jax.device_get(begin(run_config(tmp_path).model.shape))
    rules = [{"pattern": "self_attn", "freeze": True}, {"pattern": "."}]
    after, _ = train(tmp_path, optimizer={"rules": rules})
    old, new = before["model"]["layers"], jax.device_get(after)["model"]["layers"]
    jax.tree.map(np.testing.assert_array_equal, new["self_attn"], old["self_attn"])
    assert not np.array_equal(new["mlp"]["up_proj"]["weight"], old["mlp"]["up_proj"]["weight"])


def test_a_run_that_goes_on_with_other_text_says_so(tmp_path, caplog):
    path = tmp_path / "data.json"
    note_text(path, "one", 0)
    note_text(path, "one", 5)
    assert not caplog.records
    note_text(path, "other", 5)
    note_text(path, "other", 8)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (
        "the text was prepared anew, from other text or with other settings, since step 0: the steps "
        "from 5 on"
    ) in caplog.text
    assert [entry["from_step"] for entry in json.loads(path.read_text())["text"]] == [0, 5]
    note_text(path, "third", 0)
    assert json.loads(path.read_text())["text"] == [{"from_step": 0, "fingerprint": "third"}]


def test_budgets_in_tokens_become_steps(run_config, tmp_path):
    stage = {
        "name": "only",
        "tokens": 4 * 64 * 7 + 100,
        "schedule": {"peak": 1e-3},
        "mixture": {"max_epochs": 1000.0},
    }
    config = run_config(tmp_path, stages=[stage])
    (plan,) = plan_stages(config)
    assert abs(sum(tokens_of_steps(config, plan)) - stage["tokens"]) <= 4 * 64


def test_passes_over_all_text_cut_a_budget(run_config, small_prepared, tmp_path):
    stage = {
        "name": "only",
        "steps": 10_000,
        "max_passes": 2.0,
        "schedule": {"peak": 1e-3},
        "mixture": {"max_epochs": 1000.0},
    }
    config = run_config(tmp_path, stages=[stage])
    (plan,) = plan_stages(config)
    assert (
        abs(sum(tokens_of_steps(config, plan)) - 2 * sum(open_prepared(small_prepared).available.values()))
        <= 4 * 64
    )
    (plan,) = plan_stages(run_config(tmp_path, stages=[stage | {"steps": 3}]))
    assert plan.end == 3


def test_a_mesh_that_does_not_fit(train, tmp_path):
    with pytest.raises(BadInput, match=r"data = 3, fsdp = 1, context = 1, tensor = 1 does not fit 1 devices"):
        train(tmp_path, training={"mesh": {"data": 3}})
    with pytest.raises(BadInput, match=r"unknown axis rows; valid axes: data, fsdp, ring, context, tensor"):
        train(tmp_path, training={"mesh": {"rows": 1}})


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on(undisturbed, train, tmp_path, monkeypatch, sent):
    """A closed terminal (SIGHUP) is as SIGTERM."""
    folder, _ = undisturbed

    def warn(self, step, *rest, log=Metrics.log):
        if step == 4:
            signal.raise_signal(sent)
        return log(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", warn)
        with pytest.raises(Preempted, match=f"stopped by {sent.name}: saved step 5 of 10"):
            train(tmp_path)
    assert (tmp_path / "checkpoints" / "5").is_dir()
    train(tmp_path)
    assert losses(tmp_path) == losses(folder)


def test_the_newest_checkpoints_stay_and_some_for_good(train, tmp_path):
    train(tmp_path, training={"checkpoint_every": 2, "keep_checkpoints": 1, "keep_every": 4})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "8", "10"}


def test_a_checkpoint_of_another_model_is_refused_and_stays(undisturbed, train, tmp_path):
    folder, _ = undisturbed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shape = {
        "vocab_size": 1280,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    with pytest.raises(
        BadInput,
        match=(
            r"checkpoints/10: a checkpoint of another model \(intermediate_size 48, here 64\); give another "
            r"out"
        ),
    ):
        train(tmp_path, model={"shape": shape})
    assert (tmp_path / "checkpoints" / "10").is_dir()


def test_a_write_that_failed_is_noticed_before_the_next_save(run_config, tmp_path):
    """As on a full disk: no file of this process can grow beyond 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    shape = run_config(tmp_path).model.shape
    checkpoints = Checkpoints(tmp_path / "checkpoints", lambda _: shape, keep=2, keep_every=None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        params = jax.random.normal(jax.random.key(0), (1000, 1000))
        checkpoints.save(2, SimpleNamespace(params=params), "first")
        for thread in threading.enumerate():
            if thread.name == "save_finalize":
                threading.Thread.join(thread)
        with pytest.raises(ValueError, match="File too large"):
            checkpoints.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "checkpoints" / "2").exists()


def test_options_of_the_compiler_are_given_and_unknown_ones_refused(train, tmp_path):
    """They go to XLA: it refuses what it does not know."""
    with pytest.raises(BadInput) as refused:
        train(tmp_path, training={"compiler_options": {"xla_nonsense": True}})
    assert str(refused.value).startswith(
        "training.compiler_options: INVALID_ARGUMENT: No such compile option"
    )
    assert "\n" not in str(refused.value)


def test_steps_are_traced_on_request(run_config, begin, tmp_path, caplog):
    config = run_config(tmp_path)
    shape = config.model.shape
    train_stages(
        config, depths(shape, (), ()), lambda: begin(shape), tmp_path, lambda *_: None, profile=range(2, 4)
    )
    (trace,) = (tmp_path / "tensorboard").glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    train_stages(
        config, depths(shape, (), ()), lambda: begin(shape), tmp_path, lambda *_: None, profile=range(2, 4)
    )
    assert "none of these steps was done" in caplog.text


def test_lines_say_where_the_time_went(undisturbed):
    folder, _ = undisturbed
    lines = read_json_lines(folder / "metrics.jsonl")
    assert all(0 < line["goodput"] < 1 and line["seconds"] > 0 for line in lines)
    for before, after in itertools.pairwise(lines):
        assert after["time_spent"]["step"] > before["time_spent"]["step"]
    assert lines[-1]["goodput"] == pytest.approx(
        lines[-1]["time_spent"]["step"] / sum(lines[-1]["time_spent"].values()), abs=1e-3
    )
    parts = goodput_of(folder / "goodput.json")
    assert sum(parts.values()) == pytest.approx(1)
    assert all(parts[name] > 0 for name in ("step", "compile", "data", "checkpoint", "setup"))
    assert parts["lost"] == parts["down"] == 0


def test_the_seconds_of_a_step_are_its_own(train, tmp_path, monkeypatch):
    """Compiling and saving are not in them: a run that does steps again takes them for lost."""
    seconds = itertools.count()

    def slow(does):
        def act(*arguments):
            for _ in range(1000):
                next(seconds)
            return does(*arguments)

        return act

    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(run, "compiled_by_all", slow(run.compiled_by_all))
    monkeypatch.setattr(run.Checkpoints, "save", slow(run.Checkpoints.save))
    train(tmp_path)
    assert all(line["seconds"] < 100 for line in read_json_lines(tmp_path / "metrics.jsonl"))


def test_steps_done_again_count_as_lost_also_after_a_start_that_came_to_nothing(
    train, cut_off, tmp_path, monkeypatch
):
    cut_off(5, lambda: train(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(run, "_program", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            train(tmp_path)
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 3
    train(tmp_path)
    assert json.loads((tmp_path / "goodput.json").read_text())["seconds"]["lost"] > 0


def test_killed_when_a_save_is_on_disk_no_line_is_missing(undisturbed, train, tmp_path, monkeypatch):
    folder, _ = undisturbed

    def save_and_die(self, *arguments, save=run.Checkpoints.save):
        save(self, *arguments)
        self.wait()
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(run.Checkpoints, "save", save_and_die)
        patch.setattr(Metrics, "close", lambda _: None)
        with pytest.raises(RuntimeError, match="killed"):
            train(tmp_path)
    assert (tmp_path / "checkpoints" / "3").is_dir()
    train(tmp_path)
    assert losses(tmp_path) == losses(folder)
