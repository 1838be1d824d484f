"""The end of `babel demo`: what the model says, and how to ask it for more."""

import json

from babel_jax.recipe.demo import _words_of


def test_the_demo_ends_with_words_of_the_model(tmp_path):
    samples = {
        "de": {"prompt": "Am Morgen", "text": " geht"},
        "en": {"prompt": "It's time", "text": " to go\nhome"},
        "sw": {"prompt": "Kila", "text": " siku"},
    }
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    assert _words_of(tmp_path) == [
        "The model continues:",
        "  English: It's time to go home",
        "  Swahili: Kila siku",
        f"Ask it yourself: babel generate {tmp_path / 'hf'} 'It'\"'\"'s time'",
    ]
