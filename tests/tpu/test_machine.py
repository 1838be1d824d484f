"""The plan for one machine: its model of memory against programs that XLA compiled, and what it advises."""

import json
from pathlib import Path

import pytest

from babel_jax.cli import main
from babel_jax.config.file import load_config
from babel_jax.hardware import GPUS
from babel_jax.tpu import machine
from babel_jax.tpu.machine import memory_of, mesh_of, plan_machine
from babel_jax.tpu.shapes import base_of, trained_shape

ROOT = Path(__file__).parents[2]
COMPILED = json.loads((ROOT / "benchmarks" / "pod_plans.json").read_text())
# The steps of one text of 4,096 tokens or half of it on each chip, with all that they keep on the chip.
STEPS = [
    key
    for key, row in COMPILED.items()
    if row.get("seq_len") == 4096 and not row["host_gib"] and row["hbm_gib"].get("temporaries")
]


@pytest.mark.parametrize("key", STEPS)
def test_memory_is_that_of_the_compiled_step(key):
    name, _, _, *settings = key.replace(", ", ",").split(" ")
    overrides = tuple(setting for setting in settings if "mesh" not in setting)
    config = load_config(ROOT / "configs" / f"{name}.toml", overrides)
    row = COMPILED[key]
    mesh = {axis: row["mesh"][axis] for axis in ("data", "context", "tensor")}
    mesh["fsdp"] = row["mesh"]["fsdp"] * row["mesh"]["ring"]
    memory = memory_of(config, trained_shape(config, base_of(config).config), mesh)
    compiled = row["hbm_gib"]["arguments"] + row["hbm_gib"]["temporaries"]
    assert memory.total == pytest.approx(compiled, rel=0.1)


def planned(device, devices=1, *overrides):
    config = load_config(ROOT / "configs" / "babel-9b.toml", (*overrides, "training.global_batch_size=64"))
    return plan_machine(config, device, devices, compiles=False)


def test_a_9b_model_needs_several_cards_and_is_told_what_to_change():
    alone = planned("l4")
    assert not alone["fits"]
    # 9.0 billion parameters with float32 moments and gradients alone need 16 bytes each.
    assert alone["memory_gib"]["total"] > 9.01e9 * 16 / 2**30
    assert "or more --devices" in alone["summary"]
    several = planned("h100", 8, "training.remat=mlp", "training.gradient_accumulation=1")
    assert not several["fits"]
    options = several["advice"].removeprefix("--set ").split(" --set ")
    again = planned("h100", 8, "training.remat=mlp", *options)
    assert again["fits"], again["summary"]
    assert "not compiled" in again["summary"]


def test_float32_has_half_of_the_peak():
    """TensorFloat-32 on the data sheets: 494 of 989 TFLOP/s for the H100, 156 of 312 for the A100."""
    wide, narrow = (
        planned("h100", 8, f"training.compute_dtype={dtype}") for dtype in ("float32", "bfloat16")
    )
    assert wide["seconds"]["compute"] == pytest.approx(2 * narrow["seconds"]["compute"])


def test_the_rate_is_at_most_the_peak_and_the_price_is_counted():
    result = planned("a100", 8, "prices={a100=2.0}")
    flops = 6 * result["parameters"] * result["tokens_per_second"] / 8
    assert 0.5 * GPUS["a100"].bf16 < flops < GPUS["a100"].bf16
    stage = result["stages"][0]
    assert stage["cost"] == pytest.approx(2.0 * 8 * 24 * stage["days"])


def test_the_command_and_its_errors(capsys):
    config = str(ROOT / "configs" / "babel-9b.toml")
    assert main(["plan", config, "--device", "l4", "--devices", "3"]) == 2
    assert "cannot be divided by" in capsys.readouterr().err
    assert main(["plan", config, "--device", "l4", "--search"]) == 2
    assert "are for --topology" in capsys.readouterr().err
    assert main(["plan", config, "--device", "l4", "--devices", "2", "--set", "training.mesh={fsdp=4}"]) == 2
    assert "training.mesh (fsdp = 4) is not for 2 devices" in capsys.readouterr().err
    assert main(["plan", config, "--device", "cpu", "--json", "--set", "training.global_batch_size=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_second"] > 0


def test_the_rest_of_the_devices_is_one_axis():
    config = load_config(ROOT / "configs" / "babel-9b.toml", ("training.mesh={data=2, fsdp=-1}",))
    assert mesh_of(config, 8) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}


_GIB = 2**30
_MEASURED = {
    "kind": "step", "name": "step: one", "mesh": {"data": 1, "fsdp": 1, "ring": 1, "context": 1, "tensor": 1},
    "hardware_flops": 121e12 * 3, "hbm_bytes": 300e9 * 2, "collectives": [], "compile_seconds": 1.0,
    "beside": 0, "arguments": 6 * _GIB, "temporaries": 10 * _GIB, "results": 0, "peak": 16 * _GIB,
}  # fmt: skip


def test_a_card_is_compiled_for_where_the_compiler_is(tiny_toml, monkeypatch, capsys):
    """With a stand-in for the compiler: 16 GiB for the step, and another program that is too large."""
    requests = []

    def compiled(config, base, target, request):
        requests.append(request)
        large = {"kind": "suite, prefill", "name": "suite, prefill: one", "beside": 20 * _GIB}
        return [_MEASURED, _MEASURED | large]

    monkeypatch.setattr(machine, "has_compiler", lambda: True)
    monkeypatch.setattr(machine, "compiled_programs", compiled)
    assert main(["plan", str(tiny_toml), "--device", "l4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert requests == [{"which": "train", "device": "l4", "devices": 1}]
    assert told["memory_gib"]["total"] == 16
    assert [program["fits"] for program in told["programs"]] == [True, False]
    assert not told["fits"]
    assert told["advice"].startswith("evaluation.suite_items = 0, ")
    # 3 seconds at 121 TFLOP/s; the text has the words of both figures.
    config = load_config(tiny_toml)
    tokens = config.training.global_batch_size * config.data.seq_len
    assert told["tokens_per_second"] == pytest.approx(tokens / 3)
    assert "compiled by jax" in told["summary"]
    # The CPU has no such compiler.
    assert main(["plan", str(tiny_toml), "--device", "cpu"]) == 0
    assert "not compiled" in capsys.readouterr().out


def test_a_plan_needs_the_config_of_a_model_alone(tiny_toml, tmp_path, capsys):
    """Before its weights are downloaded."""
    folder = tmp_path / "Qwen2.5-0.5B"
    folder.mkdir()
    # As published (config.json of Qwen2.5-0.5B): 494 million parameters.
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
                "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "silu",
            }
        )
    )  # fmt: skip
    text = tiny_toml.read_text().split("[model.shape]")
    rest = text[1][text[1].index("[data]") :]
    tiny_toml.write_text(f'{text[0]}[model]\nfolder = "{folder}"\n{rest}')
    assert main(["plan", str(tiny_toml), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 494_032_768


def test_a_step_is_compiled_for_a_card_without_one(tiny_toml):
    """By XLA for CUDA: eight cards, with their collectives. It needs the extra `gpu`."""
    pytest.importorskip("jax_cuda12_plugin", reason="JAX's plugin for CUDA is not installed")
    found = plan_machine(
        load_config(tiny_toml, ("training.global_batch_size=8",)), "h100", 8, which=machine.Which.STEP
    )
    assert found["fits"]
    assert found["programs"][0]["wire_bytes"] > 0
    assert 0 < found["memory_gib"]["total"] < 1
