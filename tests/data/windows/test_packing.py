import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.data.windows import packing
from babel_jax.data.windows.packing import pack

EOS = 0
documents_strategy = st.lists(st.lists(st.integers(1, 2**32 - 1), max_size=30), max_size=30)


def packed_one_by_one(documents, seq_len):
    """The same windows, token by token."""
    windows, tokens, segments, segment = [], [], [], 0
    for document in documents:
        segment += 1
        for token in [*document, EOS]:
            if len(tokens) == seq_len:
                windows.append((tokens, segments))
                tokens, segments, segment = [], [], 1
            tokens.append(token)
            segments.append(segment)
        if len(tokens) == seq_len:
            windows.append((tokens, segments))
            tokens, segments, segment = [], [], 0
    if tokens:
        missing = seq_len - len(tokens)
        windows.append((tokens + [EOS] * missing, segments + [0] * missing))
    return windows


@given(documents_strategy, st.integers(1, 40), st.integers(1, 50))
def test_windows_are_those_of_packing_token_by_token(documents, seq_len, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BLOCK_TOKENS", block)
        windows = list(pack(iter(documents), seq_len, EOS))
    assert [(tokens.tolist(), segments.tolist()) for tokens, segments in windows] == packed_one_by_one(
        documents, seq_len
    )
    assert all(array.dtype == np.uint32 for window in windows for array in window)


@given(documents_strategy, st.integers(1, 40))
def test_no_token_is_lost_and_only_the_last_window_is_padded(documents, seq_len):
    windows = list(pack(documents, seq_len, EOS))
    kept = [token for tokens, segments in windows for token in tokens[segments > 0].tolist()]
    assert kept == [token for document in documents for token in [*document, EOS]]
    for number, (_, segments) in enumerate(windows):
        real = segments[segments > 0]
        assert real[0] == 1
        assert set(np.diff(real.astype(int))) <= {0, 1}
        padding = np.flatnonzero(segments == 0)
        assert len(padding) == 0 or (
            number == len(windows) - 1 and padding.tolist() == list(range(len(real), seq_len))
        )


def test_no_documents_give_no_window():
    assert list(pack([], 8, EOS)) == []
