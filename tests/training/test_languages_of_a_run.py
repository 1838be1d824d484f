"""The languages of a run: their order in counts and checkpoints, and a language that is added on the way."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from babel_jax.config import Config
from babel_jax.config.file import load_config, parse_settings
from babel_jax.errors import BadInput
from babel_jax.languages import BABEL
from babel_jax.recipe.claim import claim
from babel_jax.training.deepening import Depth
from babel_jax.training.run import train_stages
from babel_jax.training.run_state import Checkpoints, abstract_state, read_json_lines
from babel_jax.training.saved_steps import noted_in
from babel_jax.training.spikes import no_recent
from babel_jax.training.step import TrainState


def state_of(windows_seen):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        {"w": jnp.ones(3)}, {"m": jnp.ones(3)}, zero, zero, jnp.array(windows_seen, jnp.int32), no_recent()
    )


def saved_and_restored(tmp_path, shape, before, after, languages, forget=False):
    """The counts that a run with `languages` restores, of a state with the counts `before`."""
    with Checkpoints(tmp_path, lambda _: shape, 2, None, languages=tuple(before)) as checkpoints:
        checkpoints.save(5, state_of(list(before.values())), "first")
        checkpoints.wait()
    if forget:
        # A version with 25 languages noted none of them.
        path = tmp_path / "5" / "_CHECKPOINT_METADATA"
        noted = json.loads(path.read_text())
        for name in ("languages", "sha256"):
            del noted["custom_metadata"][name]
        path.write_text(json.dumps(noted))
        for file in tmp_path.rglob("SHA256SUMS*"):
            file.unlink()
    state = state_of([0] * len(languages))
    abstract = abstract_state(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    with Checkpoints(tmp_path, lambda _: shape, 2, None, languages=languages) as checkpoints:
        _, _, restored = checkpoints.restore(lambda *_: abstract)
    return dict(zip(languages, np.asarray(restored.windows_seen).tolist(), strict=True))


def test_counts_belong_to_their_languages_in_any_order(tmp_path, run_config):
    shape = run_config(tmp_path).model.shape
    before = {"sw": 3, "en": 5, "ha": 7}
    after = saved_and_restored(tmp_path / "a", shape, before, None, ("sw", "en", "ha", "yo"))
    assert after == {"sw": 3, "en": 5, "ha": 7, "yo": 0}
    after = saved_and_restored(tmp_path / "b", shape, before, None, ("en", "yo", "ha", "sw"))
    assert after == {"en": 5, "yo": 0, "ha": 7, "sw": 3}
    assert noted_in(tmp_path / "a" / "5").languages == ("sw", "en", "ha")


def test_a_checkpoint_of_a_version_with_25_languages_is_read(tmp_path, run_config):
    before = dict(zip(BABEL, range(25), strict=True))
    shape = run_config(tmp_path).model.shape
    after = saved_and_restored(tmp_path / "c", shape, before, None, ("ha", "en", "yo"), forget=True)
    assert after == {"ha": BABEL.index("ha"), "en": 0, "yo": 0}


def test_a_run_counts_in_the_order_of_its_config_and_keeps_it(run_config, begin, tmp_path, cut_off):
    """A language is added while the run is stopped. What it has no text for changes no step."""

    def go(folder, *codes):
        folder.mkdir(exist_ok=True)
        config = run_config(folder, languages=[{"code": code} for code in codes])
        shape = config.model.shape
        return train_stages(config, [Depth(0, shape, ())], lambda: begin(shape), folder, lambda *_: None)

    whole = jax.device_get(go(tmp_path / "whole", "ha", "sw"))
    resumed = tmp_path / "resumed"
    cut_off(4, lambda: go(resumed, "ha", "sw"))
    again = jax.device_get(go(resumed, "ha", "sw", "yor"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, again)))
    last = noted_in(resumed / "checkpoints" / "10").languages
    assert last[:3] == ("ha", "sw", "yo")
    assert set(last) == {"ha", "sw", "yo", "en", "zh"}
    for folder in ("whole", "resumed"):
        lines = read_json_lines(tmp_path / folder / "metrics.jsonl")
        assert list(lines[-1]["tokens_by_language"])[:2] == ["ha", "sw"]
    first, second = (read_json_lines(tmp_path / folder / "metrics.jsonl") for folder in ("whole", "resumed"))
    assert [line["tokens_by_language"] for line in first] == [line["tokens_by_language"] for line in second]
    assert [line["loss_by_language"] for line in first] == [line["loss_by_language"] for line in second]


# --- The config of the run folder. -------------------------------------------------------------------------


def config_of(out, *codes, **changes):
    values = {
        "out": str(out),
        "model": {"folder": "nowhere"},
        "data": {
            "folder": "data",
            "sources": [{"language": code, "path": f"{code}.jsonl"} for code in codes],
        },
        "stages": [{"name": "only", "steps": 5, "schedule": {"peak": 1e-3}}],
        **changes,
    }
    return parse_settings(Config, values, "run.toml")


@pytest.fixture
def begun(tmp_path):
    """A run folder that has computed something, begun with Swahili and English, in this order."""
    out = tmp_path / "run"
    out.mkdir()
    claim(out, config_of(out, "sw", "en", languages=[{"code": "sw"}]))
    (out / "evaluation").mkdir()
    return out


def order_in(out):
    return [one.code for one in load_config(out / "config.toml").languages]


def test_a_run_keeps_its_order_when_languages_are_added(begun):
    assert order_in(begun) == ["sw", "en"]
    # With another folder of prepared data, which the new text may need, and the new text in the middle.
    sources = [{"language": code, "path": f"{code}.jsonl"} for code in ("sw", "yor", "en", "am")]
    data = {"folder": "data2", "sources": sources}
    config = claim(begun, config_of(begun, data=data))
    assert config.order == ("sw", "en", "am", "yo")
    assert order_in(begun) == ["sw", "en", "am", "yo"]
    # Once more, as it is.
    assert claim(begun, config_of(begun, data=data)).order == config.order


def test_shares_of_an_added_language_may_be_given(begun, caplog):
    caplog.set_level(logging.INFO, "babel")
    stage = {"name": "only", "steps": 5, "schedule": {"peak": 1e-3}, "mixture": {"curated": {"yo": 0.2}}}
    config = claim(begun, config_of(begun, "sw", "en", "yo", stages=[stage]))
    assert config.stages[0].mixture.curated == {"yo": 0.2}
    assert "begun with 2 languages, and now Yoruba (yo) too" in caplog.text


@pytest.mark.parametrize(
    ("codes", "changes", "says"),
    [
        (("sw", "yo"), {}, "begun with another"),
        (("sw", "en", "yo"), {"seed": 5}, "begun with another seed"),
        (("sw", "en"), {"data": {"folder": "other", "sources": []}}, "begun with another"),
    ],
)
def test_other_changes_are_refused_as_before(begun, codes, changes, says):
    with pytest.raises(BadInput, match=says):
        claim(begun, config_of(begun, *codes, **changes))


def test_a_finished_run_takes_no_new_language(begun):
    (begun / "summary.json").write_text("{}")
    with pytest.raises(BadInput, match=r"takes no new language \(yo\); give another out, and .*/hf as model"):
        claim(begun, config_of(begun, "sw", "en", "yo"))


def test_a_run_of_an_earlier_version_gets_an_order(begun):
    """Its config has no languages: those of its sources, in the registry's order."""
    config = config_of(begun, "sw", "en")
    config.save(begun / "config.toml")
    assert "languages = []\n" in (begun / "config.toml").read_text()
    assert claim(begun, config_of(begun, "sw", "en", "am")).order == ("en", "sw", "am")
