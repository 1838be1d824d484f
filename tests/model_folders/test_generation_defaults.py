import json
import logging

import pytest

from babel_jax.errors import BadInput
from babel_jax.model_folders.generation_defaults import stored_repetition_penalty


def test_the_penalty_of_the_folder_and_what_is_not_applied(tmp_path, caplog):
    assert stored_repetition_penalty(tmp_path) == 1.0
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 1.05, "min_length": 0, "top_k": 20}))
    assert stored_repetition_penalty(tmp_path) == 1.05
    assert not caplog.records
    path.write_text(
        json.dumps({"repetition_penalty": None, "no_repeat_ngram_size": 3, "bad_words_ids": [[1]]})
    )
    with caplog.at_level(logging.WARNING, "babel"):
        assert stored_repetition_penalty(tmp_path) == 1.0
    assert "no_repeat_ngram_size = 3, bad_words_ids = [[1]]" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"repetition_penalty": 0}', '{"repetition_penalty": "1"}', '{"repetition_penalty": true}'],
)
def test_what_is_no_penalty_is_said(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(BadInput, match="generation_config.json"):
        stored_repetition_penalty(tmp_path)
