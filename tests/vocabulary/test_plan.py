"""The larger vocabulary in plans and rehearsals, and its growth on a mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import traverse_util

from babel_jax.cli import main
from babel_jax.errors import BadInput
from babel_jax.model.decoder import count_parameters
from babel_jax.tpu.kinds import BITS_PER_BYTE, GROWTH, STEP, SUITE
from babel_jax.tpu.programs import training_programs
from babel_jax.tpu.shapes import base_from_json, base_of, expanded, new_rows, trained_shape
from babel_jax.training.mesh import make_mesh
from babel_jax.vocabulary.larger import planned_growth

ROWS, TOKENS = 640, 603  # of the model, and of its tokenizer


def rows_of(program):
    """The rows of the embedding among a program's arguments."""
    found = set()
    for argument in program.arguments:
        tree = getattr(argument, "params", argument)
        leaves = traverse_util.flatten_dict(tree) if isinstance(tree, dict) else {}
        found |= {leaf.shape[0] for place, leaf in leaves.items() if "embed_tokens" in place}
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_every_program_of_a_run_with_a_larger_vocabulary(settings_of, make_model, qwen_files, tied, tmp_path):
    model = make_model(qwen_files, ROWS, tie_word_embeddings=tied)
    config = settings_of(model={"folder": str(model)}, data={"folder": str(tmp_path / "data")})
    base = base_of(config)
    assert base.config.vocab_size == ROWS
    # 603 tokens and 80 new ones: 683, and the next multiple of 64.
    assert expanded(config, base.config).vocab_size == trained_shape(config, base.config).vocab_size == 704
    assert new_rows(config, base) == tuple(range(TOKENS, TOKENS + 80))
    assert base_from_json(json.loads(json.dumps(base.to_json()))) == base

    programs = training_programs(config, base, make_mesh({}, jax.devices()[:1]))
    kinds = [program.kind for program in programs]
    growth = kinds.index(GROWTH)
    assert (kinds.count(GROWTH), [kind for kind in kinds if kind == STEP]) == (1, [STEP, STEP])
    points = [point for program in programs if program.kind == BITS_PER_BYTE for point in program.points]
    assert points == ["base", "extended", "expanded", "rows", "all"]
    # The parent has its own rows; everything after the growth has the larger head.
    for number, program in enumerate(programs):
        of_parent = number <= growth or "parent" in program.points
        assert rows_of(program) <= {ROWS if of_parent else 704}, program.name
    assert rows_of(programs[growth]) == {ROWS}
    assert sum(bool(rows_of(program)) for program in programs[growth + 1 :]) > 8
    # A step of new rows keeps moments of these alone, padded to 128.
    steps = [program for program in programs if program.kind == STEP]
    moments = [
        sum(leaf.size for leaf in jax.tree.leaves(step.arguments[0].opt_state) if leaf.ndim) for step in steps
    ]
    assert moments[0] == 2 * 128 * base.config.hidden_size * (1 if tied else 2)
    assert moments[1] == 2 * count_parameters(trained_shape(config, base.config))


def test_a_run_whose_suite_does_not_translate_generates_nothing_at_its_points(settings_of):
    """The suite's questions are one program; translations are two more, the first of them `prefill`."""
    prefill, kinds = f"{SUITE}, prefill", {}
    for translates in (True, False):
        evaluation = {"suite_items": 1, "suite_translations": translates}
        config = settings_of(evaluation=evaluation)
        programs = training_programs(config, base_of(config), make_mesh({}, jax.devices()[:1]))
        kinds[translates] = {program.kind for program in programs}
    assert SUITE in kinds[True] & kinds[False]
    assert {kind for kind in kinds[True] if kind.startswith(f"{SUITE}, ")} >= {prefill}
    assert not any(kind.startswith(f"{SUITE}, ") for kind in kinds[False])


def test_a_plan_takes_the_larger_model_that_is_there(done, settings_of):
    config = settings_of()
    growth = planned_growth(config, ROWS, TOKENS)
    assert growth.sources.shape[1] < 32  # before that as many as a token may have bytes
    assert growth.sources.any()
    other = settings_of(vocabulary={"tokens": 60})
    assert planned_growth(other, ROWS, TOKENS).sources.shape == (60, 128)
    assert planned_growth(settings_of(vocabulary={"init": "all"}), ROWS, None).sources.shape == (80, 1)


def test_the_vocabulary_of_an_earlier_run_is_known_from_its_config(settings_of, tmp_path):
    earlier = settings_of(out=str(tmp_path / "earlier"), data={"folder": str(tmp_path / "data")})
    earlier.save(tmp_path / "earlier.toml")
    later = settings_of(model={"folder": str(tmp_path / "earlier" / "hf")})
    later = later.model_copy(update={"vocabulary": None})
    base = base_of(later, tmp_path)
    assert (base.config.vocab_size, base.config.num_hidden_layers) == (704, 3)
    assert base.new_rows == tuple(range(TOKENS, TOKENS + 80))
    assert new_rows(later, base) == base.new_rows


def test_a_plan_of_new_rows_needs_some(settings_of):
    config = settings_of().model_copy(update={"vocabulary": None})
    with pytest.raises(BadInput, match='stage rows: train = "new_rows", and the model has no rows of new'):
        training_programs(config, base_of(config), make_mesh({}, jax.devices()[:1]))


def test_tables_grow_on_a_mesh_whose_every_axis_is_over_1():
    script = Path(__file__).with_name("many_devices.py")
    flags = "--xla_force_host_platform_device_count=32"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    ended = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    for name, found in json.loads(ended.stdout).items():
        assert found["difference"] < 1e-6, name
        assert len(found["shards"]) == (1 if name == "tied" else 2)
        # Half of the rows, and an eighth of each row.
        assert all(shard == [2176, 8] for shard in found["shards"])
        # No device ever has a whole table.
        assert found["temporaries"] < 0.5 * found["table_bytes"]


def test_rows_that_the_mesh_does_not_divide(settings_of, make_model, qwen_files, tmp_path, capsys):
    """The parent's rows, and those that --multiple leaves odd, are refused before anything is read."""
    odd = settings_of(
        vocabulary={"multiple": 1},
        training={"mesh": {"tensor": 2}},
        data={"folder": str(tmp_path / "data")},
        out=str(tmp_path / "run"),
    )
    odd.save(tmp_path / "odd.toml")
    assert main(["rehearse", str(tmp_path / "odd.toml"), "--devices", "2"]) == 2
    message = "training.mesh: tensor = 2 does not divide the model's vocab = 683"
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_extends_the_vocabulary(settings_of, tmp_path, capsys):
    """On fsdp, ring and tensor; with a donor, joined marks and a language that the package lacks."""
    donor = {"init": "donor", "donor": settings_of().model.folder, "marks": "join"}
    config = settings_of(
        vocabulary={**donor, "languages": ["my", "yo"]},
        training={"mesh": {"fsdp": -1, "tensor": 2}},
        data={"folder": str(tmp_path / "data")},
    )
    config.save(tmp_path / "run.toml")
    arguments = ["rehearse", str(tmp_path / "run.toml"), "--devices", "8", "--json"]
    assert main(arguments) == 0, capsys.readouterr().err[-3000:]
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 1, "fsdp": 4, "ring": 2, "context": 1, "tensor": 2}
    how = {point["what"]: point["how"] for point in found["points"]}
    assert how["vocabulary"].endswith("for 16 new tokens")
    assert how["evaluation extended"].startswith("bits per byte of")
    assert how["stage rows"] == "4 steps, 4 finite losses, training new rows"
    assert "each in the list of babel plan" in how["programs"]


@pytest.mark.long
def test_a_rehearsal_trains_the_rows_of_a_folder_that_was_extended(done, settings_of, tmp_path, capsys):
    config = settings_of(model={"folder": done["hf"]}, data={"folder": str(tmp_path / "data")})
    changes = {"vocabulary": None, "expansion": None, "stages": config.stages[:1]}
    config.model_copy(update=changes).save(tmp_path / "run.toml")
    assert main(["rehearse", str(tmp_path / "run.toml"), "--devices", "4", "--json"]) == 0
    how = {point["what"]: point["how"] for point in json.loads(capsys.readouterr().out)["points"]}
    assert how["stage rows"] == "4 steps, 4 finite losses, training new rows"
