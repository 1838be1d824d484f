"""`babel plan` on tiny models: the step is compiled for real topologies, once in the suite."""

import json

import pytest

from babel_jax.cli import main
from babel_jax.config.file import configs_folder, load_config
from babel_jax.errors import BadInput
from babel_jax.model.decoder import count_parameters
from babel_jax.tpu import plan as plan_module
from babel_jax.tpu import search as search_module
from babel_jax.tpu.chips import chip_of
from babel_jax.tpu.compiling import Which
from babel_jax.tpu.plan import described
from babel_jax.tpu.shapes import base_of, trained_shape

OFFLOAD = ("training.offload_optimizer_state=true",)
KEYS = {
    "parameters", "chips", "fits", "hbm_gib", "model_flops", "hardware_flops", "wire_bytes",
    "wire_bytes_minimum", "step_seconds_bound",
    "mfu_bound", "tokens_per_day", "chip_hours",
}  # fmt: skip


def planned_shape(config):
    return trained_shape(config, base_of(config).config)


@pytest.mark.slow
def test_a_plan_of_the_real_step(tiny_toml, capsys):
    assert main(["plan", str(tiny_toml), "--topology", "v5e:2x2", "--step-only", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS
    shape = planned_shape(load_config(tiny_toml))
    assert found["parameters"] == count_parameters(shape)
    assert (found["chips"], found["fits"], found["mesh"]["fsdp"] * found["mesh"]["ring"]) == (4, True, 4)
    assert found["hbm_gib"].keys() >= {"arguments", "temporaries", "capacity"}
    # Float32 parameters and two moments, a quarter on each chip; vectors are whole everywhere, and tiles are
    # padded.
    assert (
        12 * found["parameters"] / 4
        <= found["hbm_gib"]["arguments"] * 2**30
        <= 1.3 * 12 * found["parameters"] / 4
    )
    assert found["wire_bytes_minimum"] == 6 * found["parameters"]
    # A ring of two: gathers in one stage, scatters in two.
    assert 0.9 < found["wire_bytes"] / found["wire_bytes_minimum"] < 1.6
    assert 1.0 < found["hardware_flops"] / found["model_flops"] < 1.7
    kinds = {one["kind"] for one in found["collectives"]}
    assert kinds >= {"all-gather", "reduce-scatter"} or kinds >= {"all-gather", "all-reduce"}
    (stage,) = found["stages"]
    assert stage["cost"] == pytest.approx(2 * found["chip_hours"])
    assert found["chip_hours"] == pytest.approx(stage["steps"] * found["step_seconds_bound"] * 4 / 3600)
    (program,) = found["programs"]
    assert (program["name"], program["fits"], program["seconds"]) == (
        "step: one",
        True,
        found["step_seconds_bound"],
    )


@pytest.mark.slow
def test_a_chip_of_v4_is_one_device_and_nothing_passes_between_slices_where_there_is_one(tiny_toml):
    found = plan_module.plan(
        load_config(tiny_toml, ("training.mesh={fsdp=2, tensor=2}",)), "v4:2x2x1", which=Which.STEP
    )
    assert (found["chips"], found["mesh"]["fsdp"], found["mesh"]["tensor"]) == (4, 2, 2)
    assert found["seconds"]["dcn"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_libtpu_warns_of_none_of_our_options(tiny_toml, topology, caplog):
    """libtpu 0.0.42 logs that continuation fusion may give wrong results on all chips but v5e."""
    config = load_config(tiny_toml, ("training.global_batch_size=8",))
    plan_module.plan(config, topology, which=Which.STEP)
    assert "the compiler warns" not in caplog.text


@pytest.mark.slow
def test_what_libtpu_warns_of_is_told(tiny_toml, caplog):
    option = "xla_tpu_enable_async_collective_fusion"
    unsafe = (f"training.compiler_options={{{option}=true, {option}_fuse_all_gather=true}}",)
    plan_module.plan(load_config(tiny_toml, unsafe), "v6e:2x2", which=Which.STEP)
    (warning,) = [record.getMessage() for record in caplog.records if "compiler warns" in record.getMessage()]
    assert "AllGather" in warning
    assert "incorrect results" in warning


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "matmul_dtype"), [("tpu7x:2x2x1", "float8"), ("v6e:2x4", "int8")])
def test_narrow_weights_are_gathered_as_one_byte_each(tiny_toml, topology, matmul_dtype):
    """In bfloat16 each weight of a layer takes two."""
    larger = ("training.global_batch_size=8", "model.shape.intermediate_size=4096")
    gathered = {}
    for settings in (larger, (*larger, f"training.matmul_dtype={matmul_dtype}")):
        found = plan_module.plan(load_config(tiny_toml, settings), topology, which=Which.STEP)
        gathers = [one["bytes"] for one in found["collectives"] if one["kind"] == "all-gather"]
        gathered[settings] = sum(gathers)
    whole, narrow = gathered.values()
    assert 0.45 < narrow / whole < 0.65


@pytest.mark.slow
def test_gathers_and_scatters_of_weights_are_not_made_all_reduces(tiny_toml):
    """Left to itself, the compiler transposes some gradients on v6e so that their scatters become
    all-reduces, twice the bytes.
    """
    larger = ("training.global_batch_size=16", "model.shape.vocab_size=4096", "model.shape.hidden_size=512")
    found = plan_module.plan(load_config(tiny_toml, larger), "v6e:4x4", which=Which.STEP)
    kinds = {(one["kind"], axis) for one in found["collectives"] for axis in one["axes"].split(" x ")}
    assert kinds >= {
        ("all-gather", "fsdp"),
        ("all-gather", "ring"),
        ("reduce-scatter", "fsdp"),
        ("reduce-scatter", "ring"),
    }
    # What is left are vectors, and the sums of what is measured.
    moved = dict.fromkeys((kind for kind, _ in kinds), 0)
    for collective in found["collectives"]:
        moved[collective["kind"]] += collective["bytes"]
    assert moved["all-reduce"] < moved["reduce-scatter"] / 100


def test_without_libtpu_a_line_says_what_to_install(tiny_toml, monkeypatch):
    monkeypatch.setattr(plan_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"libtpu, which is not installed: pip install 'babel-jax\[tpu\]'"):
        plan_module.plan(load_config(tiny_toml), "v5e:2x2", which=Which.STEP)


def test_the_shipped_configs_need_no_checkpoint():
    for name, parameters in (("babel-9b", 9_013_963_264), ("babel-83b", 83_238_420_480)):
        assert count_parameters(planned_shape(load_config(configs_folder() / f"{name}.toml"))) == parameters


def test_the_shape_of_a_chat_run_is_known_from_the_config_that_exports_its_model(tmp_path):
    chat = load_config(configs_folder() / "babel-9b-chat.toml")
    base = base_of(chat, configs_folder())
    assert count_parameters(base.config) == 9_013_963_264
    # Copies behind layers 14, 16 .. 24, of a model that has new ones before: positions as the deeper model
    # counts.
    assert base.new_layers == (15, 18, 21, 24, 27, 30)
    elsewhere = chat.model_copy(
        update={"model": chat.model.model_copy(update={"folder": "runs/of-nobody/hf"})}
    )
    with pytest.raises(
        BadInput, match="runs/of-nobody/hf: no such model folder, and no config in .* exports it"
    ):
        base_of(elsewhere, configs_folder())


MEASURED = {
    "kind": "step", "name": "step: one", "beside": 0, "results": 0,
    "mesh": {"data": 1, "fsdp": 2, "ring": 2, "context": 1, "tensor": 1}, "hardware_flops": 197e12,
    "compile_seconds": 1.0,
    "arguments": 2**30,     "temporaries": 2**31, "peak": 2**31, "hbm_bytes": 819e9 / 4,
    "collectives": [
        {"kind": "all-gather", "bytes": 50e9, "times": 2, "axes": ["fsdp", "ring"], "dimensions": 2,
        "slices": False},
        {"kind": "reduce-scatter", "bytes": 150e9, "times": 1, "axes": ["ring"], "dimensions": 1,
        "slices": False},
        {"kind": "all-reduce", "bytes": 3.125e9 / 2, "times": 1, "axes": ["data"], "dimensions": 0,
        "slices": True},
    ],
}  # fmt: skip


def test_the_bound_is_what_takes_longest(tiny_toml):
    config = load_config(tiny_toml)
    found = described(config, planned_shape(config), "v5e:2x2", 1, chip_of("v5e:2x2"), MEASURED)
    assert found["seconds"] == pytest.approx(
        {"compute": 1.0, "hbm": 0.25, "ici": 100 / 200 + 150 / 100, "dcn": 0.5}
    )
    assert (found["bound_by"], found["step_seconds_bound"], found["fits"]) == ("ici", 2.0, True)
    assert found["tokens_per_day"] == 4 * 256 / 2.0 * 86400
    assert "ici binds" in found["summary"]


def test_offloaded_moments_are_counted_in_the_memory_of_the_host(tiny_toml):
    config = load_config(tiny_toml, ("training.offload_optimizer_state=true",))
    shape = planned_shape(config)
    found = described(config, shape, "v5e:2x2", 1, chip_of("v5e:2x2"), MEASURED)
    assert (found["host_gib"], found["hbm_gib"]["optimizer"]) == (
        pytest.approx(8 * count_parameters(shape) / 4 / 2**30),
        0.0,
    )
    assert "host memory a chip: 0.00 GiB of moments" in found["summary"]


@pytest.mark.slow
def test_offloading_frees_the_memory_of_the_moments(tiny_toml):
    here, there = (
        plan_module.plan(load_config(tiny_toml, settings), "v5e:2x2", which=Which.STEP)["hbm_gib"]
        for settings in ((), OFFLOAD)
    )
    assert here["arguments"] - there["arguments"] == pytest.approx(here["optimizer"], rel=0.3)


def test_what_does_not_fit_says_what_to_try(tiny_toml):
    config = load_config(tiny_toml, ("training.remat=mlp", "training.global_batch_size=16"))
    short = {
        "kind": "step",
        "name": "step: one",
        "mesh": MEASURED["mesh"],
        "hardware_flops": 1e12,
        "compile_seconds": 1.0,
        "out_of_memory": {"needs": 31.55, "has": 15.75},
    }
    found = described(config, planned_shape(config), "v5e:2x2", 1, chip_of("v5e:2x2"), short)
    assert found.keys() >= KEYS
    assert not found["fits"]
    assert (
        'needs 31.6 of 15.8 GiB: try training.remat = "full", training.gradient_accumulation = 2'
        in found["summary"]
    )
    json.dumps(found, allow_nan=False)


SHORT = {
    "kind": "step", "name": "step: one", "beside": 0, "mesh": MEASURED["mesh"], "hardware_flops": 1e12,
    "compile_seconds": 1.0,
    "out_of_memory": {"needs": 20.0, "has": 15.75},
}  # fmt: skip


def test_a_plan_fits_only_where_all_programs_do(tiny_toml, monkeypatch, capsys):
    """With a stand-in for the compiler.

    What else lies on the chips and results count; what is too large is named, with what to change.
    """
    fits = MEASURED | {"kind": "bits per byte", "name": "bits per byte: base", "results": 2**30}
    beside = fits | {"name": "bits per byte: one", "beside": 13 * 2**30}  # 1 + 2 + 1 + 13 of 15.75
    found = [fits, MEASURED, beside, SHORT | {"kind": "suite, prefill", "name": "suite, prefill: one"}]
    monkeypatch.setattr(plan_module, "compiled_programs", lambda *_: found)
    assert main(["plan", str(tiny_toml), "--topology", "v5e:2x2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["fits"], [one["fits"] for one in told["programs"]]) == (False, [True, True, False, False])
    assert [one["hbm_gib"]["total"] for one in told["programs"]] == [4, 3, 17, 20]
    assert told["programs"][0]["seconds"] == 2.0
    lines = told["summary"].splitlines()
    assert (
        "bits per byte: one: needs 17.00 of 15.75 GiB, 1.25 GiB too many; try evaluation.batch_size = 4"
        in told["summary"]
    )
    assert (
        "suite, prefill: one: needs 20.00 of 15.75 GiB, 4.25 GiB too many; try evaluation.suite_items = 0"
        in told["summary"]
    )
    assert lines[-1] == "2 of 4 programs do not fit"
    monkeypatch.setattr(plan_module, "compiled_programs", lambda *_: [fits, MEASURED])
    assert main(["plan", str(tiny_toml), "--topology", "v5e:2x2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all programs fit"


@pytest.mark.slow
def test_the_one_program_that_does_not_fit_is_named(tiny_toml, capsys):
    """All of a run, compiled: 65,536 windows are measured together."""
    assert (
        main(
            [
                "plan",
                str(tiny_toml),
                "--topology",
                "v5e:2x2",
                "--set",
                "evaluation.batch_size=65536",
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    fits = {one["name"]: one["fits"] for one in told["programs"]}
    assert fits == {
        "initial parameters": True, "optimizer state": True, "step: one": True, "saving a checkpoint": True,
        "bits per byte: one": False,
        "export: type": True, "export: embedding": True, "export: a layer's matrix": True,
        "samples, prefill": True,
        "samples, a new token": True,
    }  # fmt: skip
    assert not told["fits"]
    assert "try evaluation.batch_size = 32768" in told["summary"]
    assert told["summary"].splitlines()[-1] == "1 of 10 programs do not fit"


def test_the_search_ranks_what_fits(tiny_toml, monkeypatch):
    """With a stand-in for the compiler: only full remat fits, context makes it faster, tensor does not
    divide, and attention breaks it.
    """

    def compiled(config, base, target, request):
        assert request["which"] is Which.STEP
        mesh, training = config.training.mesh, config.training
        if "tensor" in mesh:
            raise BadInput("tensor does not divide")
        if training.remat == "attention":
            raise RuntimeError("the compiler stopped with status 1:\nsomewhere")
        if training.remat != "full":
            return [SHORT]
        return [
            MEASURED | {"hardware_flops": 500e12 / mesh.get("context", 1), "hbm_bytes": 1, "collectives": []}
        ]

    monkeypatch.setattr(plan_module, "compiled_programs", compiled)
    config = load_config(
        tiny_toml,
        ("data.seq_len=8192", "model.shape.max_position_embeddings=8192", "training.mesh={data=-1}"),
    )
    found = search_module.search(config, "v5e:2x2")
    fits = [one for one in found["candidates"] if one["fits"]]
    assert [one["mesh"].get("context", 1) for one in fits[:4]] == [8, 8, 8, 4]
    assert {"data": -1} in [one["mesh"] for one in fits]
    assert "the compiler stopped with status 1: somewhere" in [
        one["why"] for one in found["candidates"] if not one["fits"]
    ]
    assert all(one["remat"] == "full" for one in fits)
    assert {one["why"] for one in found["candidates"] if not one["fits"] and "tensor" in one["mesh"]} == {
        "tensor does not divide"
    }
    assert found["mesh"] == MEASURED["mesh"]


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_best_plan_is_within_2_percent_of_the_fastest(scale):
    def planned(seconds, wire_bytes, temporaries):
        memory = {"temporaries": temporaries}
        return {"forecast_seconds": scale * seconds, "wire_bytes": wire_bytes, "hbm_gib": memory}

    fastest, fewer, smaller, slow = (
        planned(1.0, 9, 1), planned(1.019, 8, 2), planned(1.015, 8, 1), planned(1.03, 1, 0),
    )  # fmt: skip
    assert search_module._best([slow, fewer, smaller, fastest]) == smaller
    assert search_module._best([slow, fewer, fastest]) == fewer
    assert search_module._best([slow, fastest]) == fastest


@pytest.mark.slow
def test_the_heads_of_gemma2_leave_the_kernel_room_in_vmem(tiny_toml):
    """Of 256, on 8,192 tokens."""
    shape = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "num_hidden_layers": 2,
        "attn_logit_softcapping": 50.0,
    }
    windows = {"sliding_window": 4096, "layer_types": '["sliding_attention", "full_attention"]'}
    settings = (f"model.shape.{name}={value}" for name, value in (shape | windows).items())
    found = plan_module.plan(
        load_config(tiny_toml, (*settings, "data.seq_len=8192", "training.remat=mlp")),
        "v5p:2x2x1",
        which=Which.STEP,
    )
    assert found["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5q:8x8x8"], "no chip is named 'v5q'; near: v5e, v5p"),
        (
            ["--topology", "v5e:2x2", "--set", "data.seq_len=1000000"],
            "exceeds model.shape.max_position_embeddings",
        ),
        (["--topology", "v5e:2x2", "--set", "model.shape.max_layers=3"], "unknown key"),
        (
            ["--topology", "v5e:2x2", "--set", "prices.v5=1.2"],
            "prices: no chip is named v5; valid: v4, v5e, v5p, v6e, tpu7x",
        ),
    ],
)
def test_bad_input_is_one_line(tiny_toml, capsys, arguments, message):
    assert main(["plan", str(tiny_toml), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
