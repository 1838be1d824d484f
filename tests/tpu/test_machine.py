"""The plan for one machine: its model of memory against programs that XLA compiled, and what it advises."""

import json
from pathlib import Path

import pytest

from babel_jax.cli import main
from babel_jax.config.file import load_config
from babel_jax.hardware import GPUS
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
    return plan_machine(config, device, devices)


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
