"""Seconds, processor seconds and peak memory of `babel convert` and `babel expand` beside `cp` of the same
bytes, transformers and mergekit.

    python benchmarks/conversion.py [--shape 0.5b] [--rounds 3] [--scratch DIR]

Each command runs in a process of its own, all in turn, on the same random Qwen2 folder (bfloat16), with the
source in the page cache. babel returns when all is on disk, as the second `cp` does; the others leave that to
the kernel. Between two commands stand --pause seconds: a virtual machine may give free memory back to its
host, so that a `cp` that begins at once finds pages that the last output left, and a command that first
imports Python does not. Memory is the process's peak resident set; mergekit takes part where `mergekit-yaml`
is installed (0.1.4 with transformers 4.57: later ones refuse more layers).
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from babel_jax.config import ModelConfig
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.layout import tensor_shapes
from babel_jax.model_folders.safetensors_files import TensorFiles

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {
    "0.5b": ModelConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "7b": ModelConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
}
TRANSFORMERS = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


def write_model(folder: Path, config: ModelConfig) -> None:
    """A folder of random weights, written tensor by tensor."""
    folder.mkdir(parents=True)
    specs = {name: (shape, BFLOAT16) for name, shape in tensor_shapes(config).items()}
    files = TensorFiles(folder, specs)
    random = np.random.default_rng(0)
    for name, (shape, dtype) in specs.items():
        files.write(name, 0, (0.02 * random.standard_normal(shape, np.float32)).astype(dtype))
    files.close()
    values = write_hf_config(config, dtype="bfloat16")
    del values["layer_types"]  # as published configs of Qwen2.5; mergekit would not lengthen it
    (folder / "config.json").write_text(json.dumps(values))


def mergekit_plan(path: Path, source: Path, insert_after: list[int], layers: int) -> None:
    """A passthrough merge that repeats the same layers."""
    bounds = [0, *(layer + 1 for layer in insert_after), layers]
    starts = [0, *insert_after]
    slices = [
        {"sources": [{"model": str(source), "layer_range": [start, end]}]}
        for start, end in zip(starts, bounds[1:], strict=True)
    ]
    path.write_text(json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}))


def run(command: list[str]) -> tuple[float, float, int]:
    """Seconds, processor seconds and peak resident bytes of a command. Raises RuntimeError where it fails."""
    start = time.perf_counter()
    # As on a user's machine: without compiled files, Python compiles this project's files at each start.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = os.posix_spawnp(
        command[0],
        command,
        {**environment, "JAX_PLATFORMS": "cpu"},
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    seconds = time.perf_counter() - start
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--pause", type=float, default=10, help="seconds before each command (default %(default)s)"
    )
    parser.add_argument("--scratch", help="where to write (default: a temporary folder)")
    parser.add_argument("--memory-limit", default="4", help="GiB, of babel's commands (default %(default)s)")
    parser.add_argument(
        "--without-peers",
        action="store_true",
        help="only cp and babel: for models that do not fit the peers' memory",
    )
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape]
    layers = config.num_hidden_layers
    insert_after = list(range(layers // 2, layers - 2, 2))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as temporary:
        scratch = Path(temporary)
        source, orbax, out = scratch / "source", scratch / "orbax", scratch / "out"
        # In a process of its own: what this one has had resident counts, over fork and exec, as its
        # children's peak.
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(source, config))
        writer.start()
        writer.join()
        size = sum(file.stat().st_size for file in source.iterdir())
        babel = [sys.executable, "-m", "babel_jax.cli"]
        limit = ["--memory-limit", arguments.memory_limit]
        among = ["--insert-after", ",".join(map(str, insert_after)), *limit]
        run([*babel, "convert", str(source), str(orbax), *limit])
        commands = {
            "cp": ["cp", "-r", str(source), str(out)],
            "cp, and on disk": ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(source), str(out)],
            "convert hf to hf": [*babel, "convert", str(source), str(out), "--to", "hf", *limit],
            "convert hf to orbax": [*babel, "convert", str(source), str(out), *limit],
            "convert orbax to hf": [*babel, "convert", str(orbax), str(out), *limit],
            "expand hf, copy": [*babel, "expand", str(source), str(out), *among],
            "expand hf, identity": [*babel, "expand", str(source), str(out), *among, "--init", "identity"],
            "expand hf, noise": [*babel, "expand", str(source), str(out), *among, "--init", "noise"],
            "expand orbax, copy": [*babel, "expand", str(orbax), str(out), *among],
        }
        if not arguments.without_peers:
            commands["transformers load, save"] = [sys.executable, "-c", TRANSFORMERS, str(source), str(out)]
            if shutil.which("mergekit-yaml"):
                mergekit_plan(scratch / "merge.yml", source, insert_after, layers)
                commands["mergekit, copy"] = [
                    "mergekit-yaml",
                    "--no-copy-tokenizer",
                    str(scratch / "merge.yml"),
                    str(out),
                ]
        found: dict[str, list[tuple[float, float, int, int]]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                time.sleep(arguments.pause)
                seconds, processor, memory = run(command)
                written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
                found[name].append((seconds, processor, memory, written))
                shutil.rmtree(out)
    print(
        f"{arguments.shape}: {size / 2**30:.2f} GiB, {layers} layers, {len(insert_after)} inserted; medians "
        f"of {arguments.rounds} rounds"
    )
    print(
        f"{'':<26} {'seconds':>8} {'processor':>10} {'GiB written':>12} {'GiB/s':>7} {'time / cp':>10} "
        f"{'peak GiB':>9}"
    )
    copied = statistics.median(seconds / written for seconds, _, _, written in found["cp"])
    for name, each in found.items():
        seconds, processor, memory = (statistics.median(one[place] for one in each) for place in (0, 1, 2))
        written = each[0][3]
        line = (
            f"{written / 2**30:>12.2f} {written / 2**30 / seconds:>7.2f} "
            f"{seconds / written / copied:>10.2f} {memory / 2**30:>9.2f}"
        )
        print(f"{name:<26} {seconds:>8.2f} {processor:>10.2f} {line}")


if __name__ == "__main__":
    main()
