"""Files beside shards, on disks that fail."""

import errno
import resource

import numpy as np
import pytest

from babel_jax.data.refining.shards import write_array


def test_an_array_that_is_written_in_part_says_why(tmp_path):
    """NumPy itself says "1200 requested and 992 written", and no number of an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_array(tmp_path / "links.npy", np.arange(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert not (tmp_path / "links.npy").exists()
    write_array(tmp_path / "links.npy", np.arange(1000))
    np.testing.assert_array_equal(np.load(tmp_path / "links.npy"), np.arange(1000))
