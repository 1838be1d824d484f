"""A run that extends its vocabulary: its points, its export, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from babel_jax.cli import main
from babel_jax.config import Source
from babel_jax.data.sources.embedded import corpus_sources, embedded_folder
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.draws import Purpose, unit_draw
from babel_jax.errors import BadInput
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.recipe.recipe import run_recipe
from babel_jax.vocabulary.texts import texts_of

CODES = ("en", "ta", "my")


def test_it_has_a_point_for_the_larger_vocabulary(done):
    points = done["bits_per_byte"]
    assert list(points) == ["base", "extended", "expanded", "rows", "all"]
    # Layers that add nothing change nothing; new tokens do.
    assert points["expanded"] == points["extended"] != points["base"]
    assert all(set(values) == set(CODES) for values in points.values())
    # A random model needs about log2(vocabulary) bits a token: with fewer tokens it needs fewer bits a byte.
    for code in ("ta", "my"):
        assert points["extended"][code] < 0.75 * points["base"][code]
    assert points["all"]["my"] < points["rows"]["my"] < points["extended"]["my"]


def test_the_export_has_the_larger_vocabulary(done, settings_of):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config, folder = settings_of(), open_folder(done["hf"])
    assert folder.config.vocab_size == 704
    assert done["export_difference"] == 0.0
    tokenizer = open_tokenizer(done["hf"])
    assert open_prepared(config.data.folder).tokenizer_fingerprint == tokenizer.fingerprint
    text = "மொழி and မြန်မာ"
    theirs = transformers.AutoTokenizer.from_pretrained(done["hf"])
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    model = transformers.AutoModelForCausalLM.from_pretrained(done["hf"], dtype=torch.float32)
    assert model.get_output_embeddings().weight.shape[0] == 704
    assert not (folder.path / "made_from.json").exists()
    card = (folder.path / "README.md").read_text()
    assert "## Vocabulary" in card
    assert "vocabulary-extension" in card


def test_the_first_stage_trained_new_rows_alone(done, settings_of):
    config = settings_of()
    assert open_folder(done["hf"]).hf_config["babel_vocabulary"]["new_rows"] == [[603, 683]]
    lines = (open_folder(done["hf"]).path.parent / "optimizer.txt").read_text()
    assert "the rows of new tokens, none of 3 layers" in lines
    base, after = (load_params(open_folder(path)) for path in (config.model.folder, done["hf"]))
    rows = [np.asarray(params["model"]["embed_tokens"]["weight"]) for params in (base, after)]
    assert rows[0].shape == (640, 32)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), after))


def test_finished_and_asked_again(done, settings_of):
    assert run_recipe(settings_of())["bits_per_byte"] == done["bits_per_byte"]


def test_another_vocabulary_is_refused(done, settings_of):
    with pytest.raises(BadInput, match=r"begun with another vocabulary.tokens; give another out"):
        run_recipe(settings_of(vocabulary={"tokens": 60}))
    with pytest.raises(
        BadInput, match=r"data-vocabulary: made with another \[vocabulary\], text or model; give"
    ):
        run_recipe(settings_of(vocabulary={"tokens": 60}, out=f"{settings_of().out}-2"))


def test_text_of_another_tokenizer_is_refused(done, settings_of, tmp_path):
    plain = settings_of(out=str(tmp_path / "run")).model_copy(update={"vocabulary": None, "stages": ()})
    with pytest.raises(BadInput, match="another") as refused:
        run_recipe(plain)
    assert "\n" not in str(refused.value)


def test_prepare_makes_the_same_tokenizer(done, settings_of, tmp_path, capsys):
    config = settings_of(out=str(tmp_path / "run"), data={"folder": str(tmp_path / "data")})
    config.save(tmp_path / "run.toml")
    assert main(["prepare", str(tmp_path / "run.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    again, first = (
        open_prepared(path).tokenizer_fingerprint for path in (config.data.folder, settings_of().data.folder)
    )
    assert again == first


def test_settings_that_do_not_fit(settings_of):
    with pytest.raises(BadInput, match="vocabulary: it extends the tokenizer of model.folder"):
        settings_of(data={"tokenizer": "x"})
    with pytest.raises(BadInput, match="protect: my is among languages too"):
        settings_of(vocabulary={"protect": ["my"]})
    with pytest.raises(BadInput, match='init = "donor" needs donor'):
        settings_of(vocabulary={"init": "donor"})
    with pytest.raises(BadInput, match="unknown language 'xx'"):
        settings_of(vocabulary={"languages": ["xx"]})


def test_a_language_without_text(settings_of, tmp_path):
    config = settings_of(
        vocabulary={"languages": ["bn"]}, data={"folder": str(tmp_path / "d")}, out=str(tmp_path / "o")
    )
    with pytest.raises(
        BadInput, match="no text for bn to learn new tokens from; there is text for en, my, ta"
    ):
        run_recipe(config)


def test_held_out_rows_teach_no_tokens(write_rows, tmp_path):
    rows = [{"id": str(number), "text": f"text {number}"} for number in range(200)]
    path = write_rows(tmp_path / "sw.jsonl", rows)
    held_out = {row["text"] for row in rows if unit_draw(Purpose.HELDOUT, row["id"]) < 0.2}
    texts = texts_of([Source(language="sw", path=str(path))], ("sw",), (), 10**6, heldout_fraction=0.2)["sw"]
    assert 20 < len(held_out) < 60
    assert set(texts) == {row["text"] for row in rows} - held_out


@pytest.mark.parametrize(
    ("code", "text", "message"),
    [
        (
            "my",
            "All human beings are born free.",
            "my: 0% of the letters of its text .*in Burmese",
        ),
        ("ha", "人人生而自由，在尊严和权利上一律平等。", "ha: 0% of the letters of its text are Latin"),
        ("ja", "12 + 34 = 46", "ja: its text to learn new tokens from has no letter; give text in Japanese"),
    ],
)
def test_text_of_another_language(write_rows, tmp_path, code, text, message):
    rows = [{"id": str(number), "text": text} for number in range(9)]
    path = write_rows(tmp_path / f"{code}.jsonl", rows)
    with pytest.raises(BadInput, match=message):
        texts_of([Source(language=code, path=str(path))], (code,), (), 10**6)


def test_every_language_of_the_package_is_in_its_script(corpus):
    texts_of(corpus_sources(embedded_folder()), tuple(corpus), (), 10**6)
