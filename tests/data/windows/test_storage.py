import json
import subprocess
import sys

import numpy as np

from babel_jax.data.windows.packing import pack
from babel_jax.data.windows.prepared import dataset_folder
from babel_jax.data.windows.storage import open_windows, write_windows

READ_WITH_TFDS_ALONE = """
import json, sys
import tensorflow_datasets as tfds
source = tfds.data_source("windows/sw-web", split="train", data_dir=sys.argv[1])
rows = [{key: [value.tolist(), str(value.dtype)] for key, value in row.items()} for row in source]
assert "tensorflow" not in sys.modules and "babel_jax" not in sys.modules
print(json.dumps(rows))
"""


def write(folder, seq_len=16):
    place = dataset_folder(folder, "sw", "web")
    place.mkdir(parents=True)
    windows = list(pack([range(1, 3 * number + 2) for number in range(20)], seq_len, eos_id=0))
    write_windows(place, "sw-web", windows, seq_len)
    return place, windows


def test_windows_come_back_in_order_and_quietly(tmp_path, capfd):
    place, windows = write(tmp_path)
    source = open_windows(place)
    assert len(source) == len(windows)
    for read, (tokens, segment_ids) in zip(source, windows, strict=True):
        np.testing.assert_array_equal(read["tokens"], tokens)
        np.testing.assert_array_equal(read["segment_ids"], segment_ids)
    assert sorted(path.name for path in place.iterdir()) == ["1.0.0"]
    assert capfd.readouterr() == ("", "")


def test_tfds_reads_them_without_this_package_and_without_tensorflow(tmp_path):
    _, windows = write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READ_WITH_TFDS_ALONE, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    expected = [
        {"tokens": [tokens.tolist(), "uint32"], "segment_ids": [segments.tolist(), "uint32"]}
        for tokens, segments in windows
    ]
    assert json.loads(done.stdout) == expected
