"""Kills a conversion at its n-th rename, link, removal, sync or new folder, for every n of a stride, and runs
it again.

    python kills_of_conversion.py FOLDER STRIDE_TO_HF STRIDE_TO_ORBAX

FOLDER/source is the model. Prints how many kills there were; fails where bits differ or something is left
behind. The parent starts no threads, so that it may fork.
"""

import os
import shutil
import sys
from pathlib import Path

from safetensors.numpy import load_file

from babel_jax.model_folders import streaming
from babel_jax.model_folders.folder import Format
from babel_jax.model_folders.transfer import convert

PLACES = ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
KILLED = 9


def converted(source: Path, out: Path, to: Format, kill_at: int) -> int:
    """The exit status of a process of its own that converts and is killed at one place (0: at none)."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        count = 0

        def counted(real):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == kill_at:
                    os._exit(KILLED)
                return real(*arguments, **options)

            return call

        for name in PLACES:
            setattr(os, name, counted(getattr(os, name)))
        streaming._BYTES_BETWEEN_SYNCS = 200
        convert(source, out, to, shard_bytes=300)
        status = 0
    finally:
        os._exit(status)


def bits(folder: Path) -> dict:
    return {
        name: value.tobytes()
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def main() -> None:
    place, strides = Path(sys.argv[1]), sys.argv[2:]
    source, out, back = place / "source", place / "out", place / "back"
    for to, stride in zip(Format, strides, strict=True):
        kills = 0
        for kill_at in range(1, 10_000, int(stride)):
            status = converted(source, out, to, kill_at)
            if status == 0:
                break
            assert status == KILLED, status
            kills += 1
            if not out.exists():
                assert converted(source, out, to, 0) == 0, kill_at
                assert {path.name for path in place.iterdir()} == {"source", "out"}, kill_at
                assert not [
                    path for path in out.rglob("*") if path.name.endswith((".partial", "progress.jsonl"))
                ], kill_at
            if to is Format.ORBAX:
                assert converted(out, back, Format.HF, 0) == 0
            assert bits(out if to is Format.HF else back) == bits(source), kill_at
            for folder in (out, back):
                shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(out)
        print(f"{to}: {kills} kills")


if __name__ == "__main__":
    main()
