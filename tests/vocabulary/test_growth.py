"""Rows of new tokens: in folders of both formats, in memory, and by a donor."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from babel_jax.config import RowInit, VocabularySettings
from babel_jax.errors import BadInput
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.vocabulary import pursuit
from babel_jax.vocabulary.card import PROVENANCE, new_rows_of
from babel_jax.vocabulary.editable import open_vocabulary
from babel_jax.vocabulary.extended_files import write_tokenizer_files
from babel_jax.vocabulary.extension import extend_vocabulary
from babel_jax.vocabulary.folders import extend_folder
from babel_jax.vocabulary.growth import grow_config, growing, mean_growth, padded_rows
from babel_jax.vocabulary.pursuit import donor_growth, open_donor, pursue

SETTINGS = VocabularySettings(languages=("my", "ta"), tokens=100, least=2, multiple=64)
ROWS = 640  # of the model; its tokenizer has 603 tokens


@pytest.fixture(scope="session")
def texts(corpus):
    return {code: corpus[code] for code in ("my", "ta", "en")}


@pytest.fixture(scope="session")
def extension(qwen_files, texts):
    return extend_vocabulary(open_vocabulary(qwen_files), texts, SETTINGS)


def tables(params):
    leaves = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    return {path: leaf for path, leaf in leaves.items() if path.split("/")[-2] in ("embed_tokens", "lm_head")}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", list(Format))
def test_a_folder_grows_in_its_format(make_model, qwen_files, texts, extension, tmp_path, format, tied):
    source = make_model(qwen_files, ROWS, format, tie_word_embeddings=tied)
    written = extend_folder(source, tmp_path / "larger", texts, SETTINGS, verify=True)
    folder = open_folder(tmp_path / "larger")
    assert folder.format is format
    # 603 tokens and 100 new ones take 703 rows; the next multiple of 64 is 704.
    assert folder.config.vocab_size == written["vocab_size"] == 704
    before, after = tables(load_params(open_folder(source))), tables(load_params(folder))
    assert len(after) == (1 if tied else 2)
    new = list(new_rows_of(folder.hf_config))
    assert new == [row.id for row in extension.rows]
    for name, table in after.items():
        old = before[name]
        kept = [number for number in range(ROWS) if number not in set(new)]
        np.testing.assert_array_equal(table[kept], old[kept])
        for row in extension.rows[::9]:
            expected = old[list(row.parts)].astype(np.float64).mean(axis=0)
            np.testing.assert_allclose(table[row.id], expected, rtol=1e-5, atol=1e-7)
        # Rows that no token has.
        np.testing.assert_allclose(table[703], old.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert folder.hf_config[PROVENANCE]["source_vocab_size"] == ROWS
    card = (tmp_path / "larger" / "README.md").read_text()
    assert "## Vocabulary" in card
    assert "| Burmese | 50 |" in card


def test_in_memory_as_in_a_folder(make_model, qwen_files, texts, extension, tmp_path):
    source = make_model(qwen_files, ROWS)
    extend_folder(source, tmp_path / "larger", texts, SETTINGS)
    folder, params = open_folder(source), load_params(open_folder(source))
    growth = mean_growth(extension.rows, RowInit.PARTS, ROWS, padded_rows(ROWS, extension.size, 64))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    grown = growing(shardings)(params, *growth.arguments)
    larger = load_params(open_folder(tmp_path / "larger"))
    assert grow_config(folder.config, growth).vocab_size == 704
    for (path, ours), (_, theirs) in zip(
        traverse_util.flatten_dict(grown, sep="/").items(),
        traverse_util.flatten_dict(larger, sep="/").items(),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7, err_msg=path)


def test_rows_may_begin_as_the_mean_of_all(extension):
    growth = mean_growth(extension.rows, RowInit.ALL, ROWS, 704)
    table = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
    params = {"model": {"embed_tokens": {"weight": jnp.asarray(table)}}}
    grown = growing(jax.tree.map(lambda leaf: leaf.sharding, params))(params, *growth.arguments)
    found = grown["model"]["embed_tokens"]["weight"][growth.ids]
    np.testing.assert_allclose(found, np.broadcast_to(table.mean(axis=0), found.shape), rtol=1e-5, atol=1e-6)


def test_a_table_that_has_room_keeps_its_rows():
    assert padded_rows(152_064, 152_064, 128) == 152_064
    assert padded_rows(152_064, 152_065, 128) == 152_192


def test_pursuit_finds_sparse_sums():
    draw = np.random.default_rng(0)
    atoms = draw.normal(size=(300, 64)).astype(np.float32)
    chosen = np.array([[3, 80, 211], [7, 9, 299]])
    weights = np.array([[2.0, -1.0, 0.5], [1.0, 3.0, -2.0]], np.float32)
    targets = np.einsum("nt,ntw->nw", weights, atoms[chosen])
    found, factors = pursue(atoms, targets, 3)
    for row in range(2):
        expected = dict(zip(chosen[row].tolist(), weights[row].tolist(), strict=True))
        ours = dict(zip(found[row].tolist(), factors[row].tolist(), strict=True))
        assert ours.keys() == expected.keys()
        assert ours == pytest.approx(expected, rel=1e-3)


def test_a_donor_of_another_width(qwen_files, extension, tmp_path, monkeypatch):
    """A donor whose old rows are ours in a larger space, far from its origin; from the mean of all rows, each
    of its new rows is a sum of two old ones.
    """
    draw = np.random.default_rng(1)
    ours = draw.normal(size=(ROWS, 32)).astype(np.float32)
    turn = np.linalg.qr(draw.normal(size=(48, 48)))[0][:32].astype(np.float32)
    new = [row.id for row in extension.rows]
    table = np.zeros((704, 32), np.float32)
    table[:ROWS] = ours
    # Of tokens of several bytes, which both vocabularies have.
    pairs = draw.integers(300, 590, size=(len(new), 2))
    mean = ours.mean(axis=0)
    table[new] = mean + 0.9 * (ours[pairs[:, 0]] - mean) - 0.3 * (ours[pairs[:, 1]] - mean)
    shutil.copytree(qwen_files, tmp_path / "donor")
    vocabulary = open_vocabulary(qwen_files)
    write_tokenizer_files(vocabulary, extension.description, extension.model, tmp_path / "donor")
    # As published encoders have it: another name, in bfloat16.
    tensors = {"embeddings.word_embeddings.weight": (table @ turn + 1.0).astype(jnp.bfloat16)}
    save_file(tensors, tmp_path / "donor" / "model.safetensors")
    with pytest.raises(BadInput, match=r"shares 600 tokens with the model; at least 1,000 are needed"):
        open_donor(vocabulary, tmp_path / "donor")

    monkeypatch.setattr(pursuit, "_LEAST_SHARED", 100)
    growth = donor_growth(vocabulary, extension.rows, open_donor(vocabulary, tmp_path / "donor"), ROWS, 704)
    found = np.einsum("nt,ntw->nw", growth.weights, ours[growth.sources])
    found += (1 - growth.weights.sum(axis=1, keepdims=True)) * mean
    # Tokens that end within a character are left out: a donor splits their text otherwise.
    whole = [
        _is_text(vocabulary.bytes_of(row.text)) for row in sorted(extension.rows, key=lambda row: row.id)
    ]
    np.testing.assert_allclose(found[whole], table[new][whole], atol=0.03)


def _is_text(content):
    try:
        return bool(content.decode())
    except UnicodeDecodeError:
        return False


def test_tokenizer_and_embedding_that_disagree(make_model, qwen_files, texts, tmp_path):
    source = make_model(qwen_files, ROWS)
    (source / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"700": {"content": "<|extra|>"}}, "eos_token": "<|im_end|>"}'
    )
    with pytest.raises(BadInput, match="the tokenizer has ids up to 700 and the embedding has 640 rows"):
        extend_folder(source, tmp_path / "larger", texts, SETTINGS)
    assert not (tmp_path / "larger").exists()


def test_a_damaged_provenance():
    for runs in ([[5, 3]], [[0, 99]], "all", [[1]]):
        with pytest.raises(BadInput, match=r"babel_vocabulary.new_rows is .*a list of \[start, stop\]"):
            new_rows_of({"vocab_size": 64, PROVENANCE: {"new_rows": runs}})
