"""Mutated model folders through the command line: each is used (exit 0) or refused in one line (exit 2), and
leaves nothing half-made.

Seeded: `python -m pytest tests/hostile -k "seed7"` repeats one. SEEDS can be raised for a longer search.
"""

import json
import random
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from babel_jax.cli import main
from babel_jax.config import Family, LayerType, ModelConfig
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.layout import tensor_shapes

SEEDS = 12  # for each kind of file

# Values that broke something once, here or elsewhere.
NASTY = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63), 10**12, 10**40, 0.5, -0.0, 1e308, 1e-308),
    *(
        "",
        "x",
        "\x1b[31mred",
        "a\nb",
        "\u202e",
        "NaN",
        "../../etc/passwd",
        "file:///etc/passwd",
        "x" * 100_000,
        "\ud83d",
    ),
    *(
        [],
        {},
        [None],
        [1, "2"],
        {"a": {"b": []}},
        [[]] * 1000,
        ["sliding_attention"] * 3,
        ["full_attention"] * 3,
    ),
    *(
        {"rope_type": "llama3"},
        {"type": "linear", "factor": 1e308},
        {"rope_type": "default", "rope_theta": -1.0},
    ),
]
RAW = [
    b"",
    b"\x00" * 64,
    b"[" * 5000,
    b'{"a":' * 5000,
    b"\xff\xfe{}",
    b"{}",
    b"[]",
    b"3",
    b"null",
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b"{" + b" " * 10**6,
]


def folder(path, family):
    config = ModelConfig(
        family=family,
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        layer_types=(LayerType.SLIDING,) * 3 if family is Family.MISTRAL else (),
        sliding_window=4 if family is Family.MISTRAL else None,
    )
    path.mkdir()
    values = np.random.default_rng(0)
    tensors = {
        name: values.normal(size=shape).astype(np.float32) for name, shape in tensor_shapes(config).items()
    }
    names = list(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "config.json").write_text(json.dumps(write_hf_config(config, eos_token_id=1)))
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 2], "repetition_penalty": 1.1})
    )
    vocabulary = {f"w{number}": number for number in range(16)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "post_processor": None,
        "decoder": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return path


def mutated(chance, value):
    """A JSON value with one place in it changed."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.2:
        return chance.choice(NASTY)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, how = chance.choice(keys), chance.random()
    copy = value.copy()
    if how < 0.15:
        del copy[key]
    elif how < 0.3 and isinstance(value, dict):
        copy[str(chance.choice(NASTY))[:200]] = value[key]
    else:
        copy[key] = mutated(chance, value[key])
    return copy


def mutated_bytes(chance, data):
    data, how = bytearray(data), chance.random()
    if how < 0.25:
        return bytes(chance.choice(RAW))
    if how < 0.5:
        return bytes(data[: chance.randrange(len(data))])
    for _ in range(chance.choice((1, 4, 64))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def change_json(chance, path):
    if chance.random() < 0.25:
        path.write_bytes(mutated_bytes(chance, path.read_bytes()))
    else:
        values = json.loads(path.read_text())
        for _ in range(chance.choice((1, 1, 3))):
            values = mutated(chance, values) if isinstance(values, dict) else values
        path.write_text(json.dumps(values))


def change_header(chance, path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    how = chance.random()
    if how < 0.2:
        data = (
            struct.pack("<Q", chance.choice((0, 1, length - 1, length + 1, 2**24 + 1, 2**40, 2**64 - 1)))
            + data[8:]
        )
    elif how < 0.4:
        data = data[:8] + mutated_bytes(chance, data[8:])
    else:
        text = json.dumps(mutated(chance, json.loads(data[8 : 8 + length]))).encode()
        data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    path.write_bytes(data)


def change_card(chance, path):
    path.write_bytes(
        b"---\n"
        + mutated_bytes(chance, b"license: mit\nlanguage: [en, sw]\ntags:\n- chat\n")
        + b"\n---\n# A model\n"
    )


CHANGES = {
    "config.json": change_json,
    "model.safetensors.index.json": change_json,
    "model-00001-of-00002.safetensors": change_header,
    "generation_config.json": change_json,
    "tokenizer.json": change_json,
    "README.md": change_card,
}


def run(capfd, *arguments):
    status = main([*map(str, arguments)])
    said = capfd.readouterr()
    assert status in (0, 2), said.err
    assert "Traceback" not in said.err
    if status == 2:
        lines = [line for line in said.err.splitlines() if line.startswith("babel: ")]
        assert len(lines) == 1
        assert lines[0].isprintable()
        assert len(lines[0]) < 3000
    return status


@pytest.fixture(autouse=True)
def bounded_time():
    import faulthandler

    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"seed{seed}") for seed in range(SEEDS)])
@pytest.mark.parametrize("name", CHANGES)
def test_a_mutated_folder_is_used_or_refused_in_one_line(tmp_path, capfd, name, seed):
    chance = random.Random(f"{name} {seed}")
    source = folder(tmp_path / "source", chance.choice((Family.QWEN2, Family.LLAMA, Family.MISTRAL)))
    CHANGES[name](chance, source / name)
    if chance.random() < 0.5 and name != "generation_config.json":
        status = run(capfd, "convert", source, tmp_path / "out")
    else:
        status = run(capfd, "expand", source, tmp_path / "out", "--insert-after", "1", "--json")
    if status == 0:
        assert open_folder(tmp_path / "out").config.num_hidden_layers in (3, 4)
    else:
        assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("seed", range(6))
def test_a_mutated_orbax_folder_is_used_or_refused_in_one_line(tmp_path, capfd, seed):
    chance = random.Random(seed)
    assert run(capfd, "convert", folder(tmp_path / "source", Family.QWEN2), tmp_path / "orbax") == 0
    files = sorted(path for path in (tmp_path / "orbax" / "params").rglob("*") if path.is_file())
    path = chance.choice(files)
    path.write_bytes(mutated_bytes(chance, path.read_bytes()))
    if run(capfd, "convert", tmp_path / "orbax", tmp_path / "out") == 2:
        assert {path.name for path in tmp_path.iterdir()} == {"source", "orbax"}


@pytest.mark.parametrize("seed", range(8))
def test_a_mutated_plan_is_used_or_refused_in_one_line(tmp_path, capfd, seed):
    chance = random.Random(seed)
    source = folder(tmp_path / "source", Family.LLAMA)
    (tmp_path / "plan.json").write_text(
        json.dumps({"layers": [{"source": 0}, {"source": 1}, {"source": 1, "init": "zero"}, {"source": 2}]})
    )
    change_json(chance, tmp_path / "plan.json")
    if run(capfd, "expand", source, tmp_path / "out", "--plan", tmp_path / "plan.json") == 2:
        assert {path.name for path in tmp_path.iterdir()} == {"source", "plan.json"}


def test_a_plan_of_too_many_layers_and_a_deep_history(tmp_path, capfd):
    source = folder(tmp_path / "source", Family.LLAMA)
    (tmp_path / "plan.json").write_text(json.dumps({"layers": [{"source": 0}] * 20_000}))
    assert run(capfd, "expand", source, tmp_path / "out", "--plan", tmp_path / "plan.json") == 2
    config = json.loads((source / "config.json").read_text())
    history = {}
    for _ in range(900):
        history = {"source": "x", "layers": [{"source": 0}], "before": history}
    (source / "config.json").write_text(json.dumps({**config, "babel_expansion": history}))
    assert run(capfd, "expand", source, tmp_path / "out", "--append", "1") == 2
