"""Several real processes load one model and write one folder: 4 with 2 devices each, and 2 with 4."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.layout import tensor_shapes
from babel_jax.model_folders.params import load_params
from tests.forced_devices import forced_devices

EXPORTS = ("tensor", "replicated")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[4, 2])
def seen(request, tmp_path_factory):
    """The folders, and what each of the processes printed."""
    write_model, config = (
        request.getfixturevalue("write_model_of"),
        request.getfixturevalue("tiny_model_config"),
    )
    folder = tmp_path_factory.mktemp("processes")
    (folder / "out").mkdir()
    paths = [
        write_model(folder / "source", config),
        write_model(folder / "odd", config.model_copy(update={"vocab_size": 50})),
    ]
    (paths[0] / "tokenizer_config.json").write_text("{}")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("many_processes.py")
    started = [
        subprocess.Popen(
            [sys.executable, script, str(process), str(request.param), str(port), *paths, folder / "out"],
            env=forced_devices(8 // request.param),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(request.param)
    ]
    try:
        ended = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * request.param, "\n".join(
        errors[-2000:] for _, errors in ended
    )
    # XLA warns where it knows no collective for a move, and gathers the whole leaf on every device.
    assert not any("full rematerialization" in errors for _, errors in ended)
    printed = [next(line for line in output.splitlines() if line.startswith("SEEN ")) for output, _ in ended]
    return folder, [json.loads(line.removeprefix("SEEN ")) for line in printed]


def size_of(tensors):
    return sum(len(data) for _, _, data in tensors.values())


def test_each_process_reads_its_share_and_all_together_the_model_once(seen, read_bits):
    """Rows and layers of this model divide by the devices, so to the byte; how the training shards it does
    not matter.
    """
    folder, processes = seen
    size = size_of(read_bits(folder / "source"))
    for mesh in ("embed", "tensor", "copies", "replicated"):
        assert [process["bytes"][mesh] for process in processes] == [size // len(processes)] * len(processes)
    assert [process["remote"] for process in processes] == [size // len(processes)] * len(processes)


def test_where_rows_do_not_divide_little_is_read_twice(seen, read_bits):
    """50 rows of an embedding divide by 2 of the 8 devices, so there are two parts; devices of one process
    that have the same read once.
    """
    folder, processes = seen
    tensors = read_bits(folder / "odd")
    embeddings = size_of({name: value for name, value in tensors.items() if value[1] == (50, 16)})
    share = embeddings // 2 + (size_of(tensors) - embeddings) // len(processes)
    assert [process["odd"]["embed"] for process in processes] == [share] * len(processes)


def test_exported_folders_hold_every_bit_and_each_process_wrote_its_part(seen, read_bits):
    folder, processes = seen
    expected = read_bits(folder / "source")
    for name in EXPORTS:
        exported = folder / "out" / name
        assert read_bits(exported) == expected
        index = json.loads((exported / "model.safetensors.index.json").read_text())
        files = sorted(file.name for file in exported.glob("*.safetensors"))
        assert files == [
            f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
        ]
        assert sorted(set(index["weight_map"].values())) == files
        assert set(index["weight_map"]) == set(expected)
        assert index["metadata"]["total_size"] == size_of(expected)
        assert len(load_params(open_folder(exported))) == 2
    assert (folder / "out" / "tensor" / "tokenizer_config.json").is_file()
    written = [set(process["written"]) for process in processes]
    assert all(written)
    assert (
        sum(map(len, written))
        == len(set.union(*written))
        == len(tensor_shapes(open_folder(folder / "source").config))
    )
    # No file has tensors of two processes, and the loads are alike: to the largest thing that is not split,
    # an embedding or a layer.
    weight_map = json.loads((folder / "out" / "tensor" / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    of_process = [{weight_map[name] for name in names} for names in written]
    assert sum(map(len, of_process)) == len(set.union(*of_process))
    loads = [size_of({name: expected[name] for name in names}) for names in written]
    layer = size_of({name: value for name, value in expected.items() if ".layers.0." in name})
    assert max(loads) - min(loads) <= layer


def test_transformers_reads_what_several_processes_wrote(seen, read_bits):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, _ = seen
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out" / "tensor", dtype=torch.bfloat16)
    state = model.state_dict()
    for name, (_, _, data) in read_bits(folder / "source").items():
        assert state[name].view(torch.int16).numpy().tobytes() == data


def test_what_one_process_cannot_do_ends_all_and_leaves_nothing(seen):
    folder, processes = seen
    assert all("exists already" in process["exists"] for process in processes)
    assert all("no space left on the disk" in process["full"] for process in processes)
    assert [("process 1 of" in process["full"]) for process in processes] == [
        number != 1 for number in range(len(processes))
    ]
    assert all("damaged" in process["damaged"] for process in processes)
    assert {file.name for file in (folder / "out").iterdir()} == {*EXPORTS, "orbax"}
