"""Extended tokenizers of each kind: which ids they give, read by the libraries that others read them with."""

import json
import shutil

import pytest
import sentencepiece
import tokenizers

from babel_jax.config import Marks, Shares, VocabularySettings
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from babel_jax.vocabulary.editable import open_vocabulary
from babel_jax.vocabulary.extended_files import write_tokenizer_files
from babel_jax.vocabulary.extension import LLAMA_CPP_TEXT, extend_vocabulary

LANGUAGES = ("my", "ta")


@pytest.fixture(scope="session")
def extend(files_of, corpus, tmp_path_factory):
    """Extends a tokenizer, writes it, and gives (extension, vocabulary before, folder after); kept."""
    made = {}

    def go(kind, **changes):
        key = (kind, json.dumps(changes, default=str))
        if key not in made:
            settings = VocabularySettings(**{"languages": LANGUAGES, "tokens": 240, "least": 2, **changes})
            vocabulary = open_vocabulary(files_of[kind])
            texts = {code: corpus[code] for code in (*settings.languages, *settings.protect)}
            extension = extend_vocabulary(vocabulary, texts, settings)
            folder = tmp_path_factory.mktemp(kind) / "after"
            shutil.copytree(files_of[kind], folder)
            write_tokenizer_files(vocabulary, extension.description, extension.model, folder)
            made[key] = extension, vocabulary, folder
        return made[key]

    return go


KINDS = ("qwen", "llama", "unigram")


@pytest.mark.parametrize("kind", KINDS)
def test_each_new_token_is_given_by_some_text(extend, corpus, kind):
    extension, _, folder = extend(kind)
    after = open_tokenizer(folder)
    assert len(extension.rows) == 240
    assert extension.figures["unreachable"] == 0
    used = set()
    for text in (*corpus["my"], *corpus["ta"]):
        used.update(after.encode(text))
    ids = {row.id for row in extension.rows}
    # All but parts of longer tokens are in the text itself.
    assert len(ids - used) <= extension.figures["not_in_text"] < 80


@pytest.mark.parametrize("kind", KINDS)
def test_extended_languages_need_fewer_tokens_and_english_keeps_its_own(extend, corpus, kind):
    extension, vocabulary, folder = extend(kind)
    after = open_tokenizer(folder)
    for code in LANGUAGES:
        before, now = (
            sum(len(ids) for ids in tokenizer.encode_batch(corpus[code]))
            for tokenizer in (vocabulary.tokenizer, after)
        )
        assert now < 0.62 * before, code
        figures = extension.figures["languages"][code]
        measured = figures["tokens_per_byte_after"] / figures["tokens_per_byte_before"]
        assert measured == pytest.approx(now / before, rel=0.02)
    assert extension.figures["languages"]["en"]["unchanged_words"] >= 0.999
    same = [vocabulary.tokenizer.encode(text) == after.encode(text) for text in corpus["en"]]
    assert sum(same) / len(same) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_tokens_that_the_text_had_before(extend, kind):
    extension, vocabulary, _ = extend(kind)
    for row in extension.rows:
        whole = b"".join(vocabulary.bytes_of(vocabulary.texts[part]) for part in row.parts)
        assert whole == vocabulary.bytes_of(row.text)
        assert len(row.parts) > 1 or len(whole) == 1


@pytest.mark.parametrize("changes", [{}, {"marks": Marks.JOIN}, {"shares": Shares.SAVINGS}], ids=str)
def test_byte_level_ids_are_the_same_in_all_25_languages(extend, corpus, changes):
    transformers = pytest.importorskip("transformers")
    _, _, folder = extend("qwen", **changes)
    ours, raw = open_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for code, texts in corpus.items():
        for text in texts[:12]:
            expected = ours.encode(text)
            assert raw.encode(text, add_special_tokens=False).ids == expected, code
            assert theirs.encode(text, add_special_tokens=False) == expected, code
            assert ours.decode(expected) == text, code


def test_the_files_of_slow_tokenizers_have_the_same_vocabulary(extend):
    extension, _, folder = extend("qwen")
    assert json.loads((folder / "vocab.json").read_text()) == extension.description["model"]["vocab"]
    lines = (folder / "merges.txt").read_text().splitlines()
    assert lines[0] == "#version: 0.2"
    assert [tuple(line.split(" ")) for line in lines[-len(extension.merges) :]] == list(extension.merges)


@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_sentencepiece_and_tokenizers_agree_in_all_25_languages(extend, corpus, kind):
    _, _, folder = extend(kind)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = open_tokenizer(folder)
    for code, texts in corpus.items():
        for text in texts[:12]:
            expected = theirs.encode(text)
            assert ours.encode(text) == expected, code
            assert ours.encode_prompt(text, begin=False) == expected, code


def test_chat_tokens_keep_their_ids(extend, qwen_files):
    _, _, folder = extend("qwen")
    before, after = (
        tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")) for path in (qwen_files, folder)
    )
    text = "<|im_start|>user\nမြန်မာ<|im_end|>"
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        number = before.token_to_id(token)
        assert after.token_to_id(token) == number
        assert (number in after.encode(text).ids) == (token in text)


def test_what_llama_cpp_knows_a_tokenizer_by_stays(extend, qwen_files):
    for changes in ({"languages": ("zh", "ru"), "tokens": 200}, {"marks": Marks.JOIN}):
        _, vocabulary, folder = extend("qwen", **changes)
        before, after = (
            vocabulary.tokenizer.encode(LLAMA_CPP_TEXT),
            open_tokenizer(folder).encode(LLAMA_CPP_TEXT),
        )
        # With joined marks the converter must not know it: it would use the old pattern, and give other ids.
        assert (after == before) == ("marks" not in changes)


def test_joined_marks_need_fewer_tokens_still(extend):
    split, joined = (extend("qwen", marks=marks)[0].figures["languages"] for marks in Marks)
    for code in LANGUAGES:
        assert joined[code]["tokens_per_byte_after"] < 0.9 * split[code]["tokens_per_byte_after"]
    assert joined["en"]["unchanged_words"] >= 0.999


def test_an_extension_of_an_extension(extend, corpus):
    first, _, folder = extend("qwen")
    vocabulary = open_vocabulary(folder)
    settings = VocabularySettings(languages=("th",), tokens=40, least=2)
    second = extend_vocabulary(vocabulary, {code: corpus[code] for code in ("th", "en")}, settings)
    assert [row.id for row in second.rows] == list(range(first.size, first.size + 40))
    assert second.figures["languages"]["en"]["unchanged_words"] >= 0.999


def test_ids_that_no_text_gives_are_reused(qwen_files, corpus, tmp_path):
    # Two tokens that no merge makes, and an id that is missing.
    folder = tmp_path / "holes"
    shutil.copytree(qwen_files, folder)
    description = json.loads((folder / "tokenizer.json").read_text())
    vocab = description["model"]["vocab"]
    vocab |= {token["content"]: token["id"] for token in description["added_tokens"]}
    size = len(vocab)
    vocab |= {"zqzq": size, "qzqz": size + 2}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    vocabulary = open_vocabulary(folder)
    texts = {code: corpus[code] for code in ("ta", "en")}
    with pytest.raises(BadInput, match=rf"no token has the id {size + 1} \(1 ids .*add --reuse-unused"):
        extend_vocabulary(vocabulary, texts, VocabularySettings(languages=("ta",), tokens=20, least=2))
    settings = VocabularySettings(languages=("ta",), tokens=20, least=2, reuse_unused=True)
    extension = extend_vocabulary(vocabulary, texts, settings)
    assert [row.id for row in extension.rows][:4] == [size, size + 1, size + 2, size + 3]
    assert extension.figures["reused_ids"] == 3
    assert extension.figures["unreachable"] == 0
    assert "zqzq" not in extension.description["model"]["vocab"]
    assert sorted(extension.description["model"]["vocab"].values()) == list(range(extension.size))


def test_more_tokens_than_the_text_supports(files_of, corpus):
    settings = VocabularySettings(languages=("ha",), tokens=100_000, least=3)
    with pytest.raises(
        BadInput, match=r"--tokens 100,000: the text of ha supports [\d,]+ new tokens that occur"
    ):
        extend_vocabulary(
            open_vocabulary(files_of["qwen"]), {"ha": corpus["ha"], "en": corpus["en"]}, settings
        )


def test_a_tokenizer_of_another_type(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    with pytest.raises(BadInput, match="of type WordPiece; BPE of bytes or characters, and unigram, are"):
        open_vocabulary(tmp_path)


def test_marks_cannot_be_joined_where_they_are_not_split(files_of, corpus):
    settings = VocabularySettings(languages=("ta",), tokens=10, marks=Marks.JOIN)
    with pytest.raises(BadInput, match="does not split words at combining marks; leave out --marks join"):
        extend_vocabulary(
            open_vocabulary(files_of["llama"]), {"ta": corpus["ta"], "en": corpus["en"]}, settings
        )


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_a_class_that_would_split_text_otherwise_is_replaced(qwen_files, corpus, tmp_path, model_type, name):
    """transformers 5 gives GPT2Tokenizer GPT-2's pattern, whatever tokenizer.json says: all Tamil texts got
    other ids.
    """
    transformers = pytest.importorskip("transformers")
    shutil.copytree(qwen_files, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    (tmp_path / "source" / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": name})
    )
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": model_type}))
    folder = extended(tmp_path / "source", corpus, tmp_path / "after")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)
    for code in LANGUAGES:
        for text in corpus[code][:10]:
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), code
    # A class with the pattern of tokenizer.json stays.
    kept = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert (kept == name) == (name == "Qwen2Tokenizer")


def extended(source, corpus, destination, **changes):
    """The folder of an extended tokenizer."""
    settings = VocabularySettings(**{"languages": LANGUAGES, "tokens": 60, "least": 2, **changes})
    vocabulary = open_vocabulary(source)
    texts = {code: corpus[code] for code in (*LANGUAGES, "en")}
    extension = extend_vocabulary(vocabulary, texts, settings)
    shutil.copytree(source, destination)
    write_tokenizer_files(vocabulary, extension.description, extension.model, destination)
    return destination


def test_user_defined_pieces_are_never_reused(sentencepiece_bpe, corpus, tmp_path):
    """Gemma's chat tokens are such pieces of its tokenizer.model."""
    chat = ("<start_of_turn>", "<end_of_turn>", "<unused0>")
    model = sentencepiece_bpe(add_dummy_prefix=False, user_defined_symbols=list(chat))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.model").write_bytes(model)
    folder = extended(tmp_path / "source", corpus, tmp_path / "after", reuse_unused=True)
    before, after = (
        sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        for path in (tmp_path / "source", folder)
    )
    assert [after.piece_to_id(token) for token in chat] == [before.piece_to_id(token) for token in chat]
    text = "<start_of_turn>user hello<end_of_turn>"
    assert after.encode(text) == before.encode(text)
    for text in (*corpus["my"][:10], *corpus["en"][:10]):
        assert open_tokenizer(folder).encode(text) == after.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_without_an_id_keeps_the_one_that_transformers_gives_it(
    files_of, corpus, tmp_path, kind
):
    """transformers gives [PAD] the first id after the vocabulary, which a new token must not take."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(files_of[kind], tmp_path / "source")
    path = tmp_path / "source" / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {"eos_token": "</s>"}
    path.write_text(json.dumps({**config, "pad_token": "[PAD]"}))
    size = len(open_vocabulary(tmp_path / "source").texts)
    folder = extended(tmp_path / "source", corpus, tmp_path / "after")
    assert open_vocabulary(folder).added["[PAD]"] == size - 1
    if kind == "qwen":
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "source").pad_token_id == size - 1
        assert transformers.AutoTokenizer.from_pretrained(folder).pad_token_id == size - 1
    if kind == "llama":
        assert transformers.LlamaTokenizer.from_pretrained(tmp_path / "source").pad_token_id == size - 1
        assert transformers.LlamaTokenizer.from_pretrained(folder).pad_token_id == size - 1
    for text in (*corpus["my"][:10], *corpus["en"][:10]):
        assert "[PAD]" not in open_tokenizer(folder).decode(open_tokenizer(folder).encode(text))
