"""A few seeded faults of benchmarks/disk_faults.py: below all libraries, one call that changes the disk fails
or ends the process.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "hostile.py"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_faults_of_conversions(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARK),
        "--inputs",
        "0",
        "--faults",
        "24",
        "--kinds",
        "convert",
        "--seed",
        "7",
    ]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    total = done.stdout.splitlines()[-1].split()
    assert total[:2] == ["all", "24"]
    assert int(total[2]) >= 2  # ended as by a kill
    assert int(total[3]) >= 8  # refused in one line
