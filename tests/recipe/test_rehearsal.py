"""Every shipped config is rehearsed; meshes that cannot be scaled down are refused in one line."""

import jax
import jax.numpy as jnp
import pytest

from babel_jax.cli import main
from babel_jax.config.file import configs_folder, load_config
from babel_jax.errors import BadInput
from babel_jax.recipe.rehearsal import rehearse
from babel_jax.recipe.rehearsal_config import other_mesh, scaled_mesh
from babel_jax.recipe.rehearsal_worker import missing
from babel_jax.tpu.programs import Program

ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1, "ring": 1}
# 83B is 9B with more of each width; the data axis of several slices, and context and tensor, are rehearsed
# with it.
SLOW = {
    "tiny": ["--devices", "4"],
    "tiny-from-base": ["--devices", "4"],
    "ablation": ["--devices", "4"],
    "tiny-chat": ["--devices", "4"],
    "small": ["--devices", "4"],
    "small-gpu": ["--devices", "4"],
    "small-tpu": ["--devices", "4"],
    "babel-9b": [],
    "babel-9b-chat": ["--devices", "8"],
    "babel-83b": [
        "--slices",
        "2",
        "--set",
        "training.mesh={fsdp=-1, context=2}",
        "--set",
        "evaluation.every=1000",
    ],
    "babel-83b-chat": ["--devices", "8", "--set", "training.mesh={fsdp=-1, tensor=4}"],
}


@pytest.mark.parametrize(
    ("sizes", "devices", "slices", "expected"),
    [
        ({"fsdp": -1}, 16, 1, {"fsdp": 16, "ring": 2}),
        ({"fsdp": -1}, 4, 1, {"fsdp": 4, "ring": 2}),
        ({"fsdp": -1, "context": 2}, 16, 2, {"data": 2, "fsdp": 4, "ring": 2, "context": 2}),
        ({"fsdp": 64, "tensor": 9}, 12, 1, {"fsdp": 4, "ring": 2, "tensor": 3}),
        ({"data": -1}, 8, 1, {"data": 8}),
        ({"fsdp": 2, "tensor": 4}, 4, 1, {"fsdp": 2, "tensor": 2}),
        ({"data": 1, "fsdp": 1}, 1, 4, {}),
    ],
)
def test_axes_over_one_on_the_pod_are_over_one_here(sizes, devices, slices, expected):
    found = scaled_mesh(sizes, devices, slices)
    assert found == {**ONE, **expected}
    size = found["data"] * found["fsdp"] * found["context"] * found["tensor"]
    assert size == devices
    other = other_mesh(found)
    assert other["data"] * other["fsdp"] * other["context"] * other["tensor"] == devices
    assert devices == 1 or other != found


@pytest.mark.parametrize(
    ("sizes", "devices", "slices", "message"),
    [
        (
            {"fsdp": -1, "context": 2, "tensor": 2},
            8,
            1,
            "--devices 8: the mesh has fsdp, context, tensor, ring over 1, .* give --devices 16",
        ),
        ({"fsdp": -1}, 6, 1, "a multiple of 4 devices; give --devices 8"),
        ({"fsdp": -1}, 16, 3, "a multiple of 12 devices; give --devices 12"),
        ({"data": 1, "fsdp": 1}, 16, 1, "no axis over 1, which takes 1 devices; give --devices 1"),
        ({"pipeline": 2}, 16, 1, "unknown axis pipeline"),
    ],
)
def test_a_mesh_that_does_not_scale_down_is_refused(sizes, devices, slices, message):
    with pytest.raises(BadInput, match=message):
        scaled_mesh(sizes, devices, slices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "6"], "give --devices 8"),
        # Four heads of keys on eight parts: the small model would divide.
        (
            ["--set", "training.mesh={fsdp=-1, tensor=8}"],
            "tensor = 8 does not divide the model's kv_heads = 4",
        ),
        (
            ["--set", "training.mesh={fsdp=-1, context=3}", "--devices", "12"],
            "context = 3 does not divide the model's embed = 3584",
        ),
        (
            ["--set", "training.mesh={fsdp=-1, context=2}", "--set", "data.seq_len=4094"],
            "context = 2 cuts windows into 4 parts",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["rehearse", str(configs_folder() / "babel-9b.toml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_programs_that_no_plan_has_are_named():
    def train(state):
        return state

    planned = [Program("step", ("one",), jax.jit(train), (jax.ShapeDtypeStruct((2, 3), jnp.float32),))]
    assert missing({"jit(train)": 24}, planned) == []
    assert missing({"jit(train)": 25, "jit(other)": 5}, planned) == [
        "other (5 bytes of arguments)",
        "train (25 bytes of arguments, planned 24)",
    ]


@pytest.mark.slow
def test_a_rehearsal_says_what_ran(tmp_path):
    """Random weights and one stage, so that few programs are compiled."""
    found = rehearse(load_config(configs_folder() / "tiny-base.toml"), devices=4, out=tmp_path / "kept")
    assert all(point["ran"] for point in found["points"])
    how = {point["what"]: point["how"] for point in found["points"]}
    assert how.keys() >= {
        "text",
        "stage pretraining",
        "preemption",
        "resumed on another mesh",
        "evaluation base",
        "export",
        "programs",
    }
    assert how["preemption"].startswith("stopped by SIGTERM: saved step ")
    assert "each in the list of babel plan" in how["programs"]
    assert (tmp_path / "kept" / "run" / "hf" / "config.json").is_file()
    with pytest.raises(BadInput, match="not empty"):
        rehearse(load_config(configs_folder() / "tiny-base.toml"), devices=4, out=tmp_path / "kept")


@pytest.mark.long
@pytest.mark.parametrize("name", SLOW)
def test_every_shipped_config(name, capsys):
    assert main(["rehearse", str(configs_folder() / f"{name}.toml"), *SLOW[name]]) == 0, (
        capsys.readouterr().err[-3000:]
    )
    told = capsys.readouterr().out
    assert "all of it ran" in told.splitlines()[-1]


def test_all_shipped_configs_are_named_here():
    names = {path.stem for path in configs_folder().glob("*.toml")}
    assert names == {*SLOW, "tiny-base", "quality"}  # quality.toml is of a classifier, not of a run
