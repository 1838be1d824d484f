"""The recipe from a random base to an exported, deeper model, and what stands in its run folder."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from babel_jax.config.file import load_config
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from babel_jax.locks import only_process_in
from babel_jax.model.decoder import forward
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.recipe.recipe import run_recipe
from babel_jax.training.run_state import read_json_lines


@pytest.fixture(scope="session")
def config(recipe_of_grown):
    return recipe_of_grown


def test_it_measures_every_point_and_zero_layers_cost_nothing(base, grown):
    assert list(base["bits_per_byte"]) == ["base"]
    points = grown["bits_per_byte"]
    assert list(points) == ["base", "expanded", "recovered", "continued"]
    assert all(set(values) == {"en", "zh", "sw", "ha"} for values in points.values())
    assert points["base"] == base["bits_per_byte"]["base"]
    assert points["expanded"] == points["base"]
    assert grown["means"]["continued"]["all"] < grown["means"]["base"]["all"]
    assert grown["layers"] == 6
    assert list(grown["tasks"]["base"]) == [
        "bits_per_byte",
        "continuation",
        "cloze",
        "to_english",
        "from_english",
    ]
    assert grown["tasks"]["expanded"] == grown["tasks"]["base"]


def test_the_exported_folder_alone_loads_in_transformers(grown):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(grown["hf"], dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(grown["hf"])
    text = "All human beings are born free, watu wote."
    ids = open_tokenizer(grown["hf"]).encode(text)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    folder = open_folder(grown["hf"])
    ours = forward(folder.config, load_params(folder), jnp.asarray([ids]))
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert model.config.num_hidden_layers == 6
    assert sum(parameter.numel() for parameter in model.parameters()) == grown["parameters"]


def test_what_is_in_the_run_folder(config, grown, tmp_path):
    run = open_folder(grown["hf"]).path.parent
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.toml",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "mixture.json",
        "evaluation",
        "hf",
    }
    assert names >= {"summary.md", "summary.json", "summary.png", "samples.json", "report.html"}
    assert grown["export_difference"] == 0.0
    assert json.loads((run / "summary.json").read_text(encoding="utf-8")) == grown
    summary = (run / "summary.md").read_text(encoding="utf-8")
    assert "| Swahili (sw) | low |" in summary
    assert "not enough text to tell: Expansion costs less than 5% bits per byte over all 4" in summary
    assert "| continuation, accuracy % (chance 25) | all " in summary
    assert (run / "summary.png").read_bytes().startswith(b"\x89PNG")
    # The order of the languages is written down with the settings.
    assert load_config(run / "config.toml") == config.in_order(config.order)


def test_the_saved_config_alone_repeats_the_run(grown, tmp_path):
    run = open_folder(grown["hf"]).path.parent
    again = run_recipe(load_config(run / "config.toml", (f"out={tmp_path / 'again'}",)))

    def losses(folder):
        return [line["loss"] for line in read_json_lines(folder / "metrics.jsonl")]

    assert losses(tmp_path / "again") == losses(run)
    assert again["bits_per_byte"] == grown["bits_per_byte"]
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(open_folder(again["hf"])),
        load_params(open_folder(grown["hf"])),
    )


def test_a_finished_run_is_answered_from_its_summary(config, grown, monkeypatch):
    monkeypatch.setattr("babel_jax.recipe.recipe.train_stages", lambda *_: pytest.fail("trained again"))
    assert run_recipe(config) == grown


def test_a_run_folder_of_other_settings_is_refused(config, grown):
    # A mesh may change, and is not named.
    training = config.training.model_copy(update={"global_batch_size": 8, "mesh": {"data": -1}})
    changed = config.model_copy(update={"seed": 5, "training": training})
    with pytest.raises(
        BadInput, match=r"begun with another seed, training.global_batch_size; give another out"
    ):
        run_recipe(changed)


def test_a_second_process_in_the_same_run_folder_is_refused(config, grown):
    run = open_folder(grown["hf"]).path.parent
    with only_process_in(run), pytest.raises(BadInput, match="another process is at work in it"):
        run_recipe(config)


def test_a_summary_that_was_cut_is_made_again(config, grown):
    hf = open_folder(grown["hf"]).path
    path = hf.parent / "summary.json"
    path.write_text(path.read_text()[:100])
    # As the mark of an export that could not be removed.
    (hf / "progress.jsonl").touch()
    assert run_recipe(config, compare_export=True) == grown
    assert not (hf / "progress.jsonl").exists()


def test_a_page_that_is_missing_is_made_again(config, grown):
    page = open_folder(grown["hf"]).path.parent / "report.html"
    before = page.read_text()
    page.unlink()
    assert run_recipe(config, compare_export=True) == grown
    assert page.read_text() == before


def test_a_folder_that_is_no_run_folder_is_left_alone(config, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty and not a run folder"):
        run_recipe(config.model_copy(update={"out": str(tmp_path)}))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_model_tokenizer_and_data_must_fit(
    small_settings, small_prepared, small_model, tmp_path, recipe_config, shape
):
    with pytest.raises(
        BadInput, match=r"the tokenizer .* has [\d,]+ entries, and the model's embedding 100 rows"
    ):
        run_recipe(
            recipe_config(
                tmp_path / "small", small_settings, small_model, {"shape": shape | {"vocab_size": 100}}
            )
        )
    stage = {"name": "one", "steps": 1, "schedule": {"peak": 1e-3}, "mixture": {"languages": ["th"]}}
    without = small_settings.model_copy(update={"sources": ()})
    with pytest.raises(BadInput, match=r"no text for th; there is text for en zh sw ha"):
        run_recipe(recipe_config(tmp_path / "thai", without, small_model, {"shape": shape}, stages=[stage]))
    with pytest.raises(BadInput, match=r"nothing: no such model folder"):
        run_recipe(
            recipe_config(
                tmp_path / "no-model", small_settings, small_model, {"folder": str(tmp_path / "nothing")}
            )
        )


def test_a_padding_token_may_have_no_row_in_the_embedding(
    small_settings, small_model, tmp_path, recipe_config, shape
):
    """WizardLM's folders: [PAD] is in added_tokens.json, and the embedding is as it was before."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(small_model, folder / "tokenizer.model")
    rows = open_tokenizer(small_model).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": rows}))
    settings = small_settings.model_copy(update={"folder": str(tmp_path / "data")})
    config = recipe_config(
        tmp_path / "run", settings, folder, {"shape": shape | {"vocab_size": rows}}, stages=[]
    )
    assert open_folder(run_recipe(config)["hf"]).config.vocab_size == rows
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": rows, "<|end|>": rows + 1}))
    other = config.data.model_copy(update={"folder": str(tmp_path / "other")})
    with pytest.raises(BadInput, match="and the model's embedding"):
        run_recipe(config.model_copy(update={"data": other, "out": str(tmp_path / "refused")}))


def test_a_run_from_a_shape_may_be_expanded_and_have_no_stages(
    small_settings, small_model, small_prepared, tmp_path, recipe_config, shape
):
    expansion = {"insert_after": [1, 3], "init": "zero"}
    config = recipe_config(
        tmp_path / "run", small_settings, small_model, {"shape": shape}, expansion=expansion, stages=[]
    )
    found = run_recipe(config)
    assert (found["layers"], found["bits_per_byte"]) == (6, {})
    assert open_folder(found["hf"]).config.num_hidden_layers == 6


def test_a_folder_of_a_run_that_was_killed_at_once_is_taken(
    base, small_settings, small_model, tmp_path, recipe_config
):
    (tmp_path / "config.toml.partial").write_text("ou")
    stage = {"name": "one", "steps": 1, "schedule": {"peak": 1e-3}, "mixture": {"max_epochs": 1000.0}}
    assert (
        run_recipe(
            recipe_config(tmp_path, small_settings, small_model, {"folder": base["hf"]}, stages=[stage])
        )["layers"]
        == 4
    )


def test_after_a_mistake_the_corrected_config_takes_the_folder(
    base, small_settings, small_model, tmp_path, recipe_config
):
    stage = {"name": "one", "steps": 1, "schedule": {"peak": 1e-3}, "mixture": {"max_epochs": 1000.0}}
    wrong = recipe_config(
        tmp_path, small_settings, small_model, {"folder": str(tmp_path / "nothing")}, stages=[stage]
    )
    with pytest.raises(BadInput, match="no such model folder"):
        run_recipe(wrong)
    right = wrong.model_copy(update={"model": wrong.model.model_copy(update={"folder": base["hf"]})})
    assert run_recipe(right)["layers"] == 4
