"""What begins and ends a text, and how added tokens of all side files read: against transformers."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from babel_jax.data.tokens.prompts import PromptTokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from tests.sentencepiece_models import trained_bpe

TEXTS = [
    "Habari ya asubuhi",
    "<s>a</s>",
    "<|turn|>user<|end|> x <think>",
    "",
    "  two  spaces\n",
    "مرحبا 你好 ကောင်း",
]
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}"


def byte_level(folder: Path, added=(), begin=None, config=None) -> Path:
    """A folder with a tokenizer of bytes, 256 tokens, then <s>, </s> and `added`; `begin` is a template of
    the post-processor.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(list(added))
    if begin:
        used = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in begin]
        tokenizer.post_processor = processors.TemplateProcessing(single=begin, special_tokens=used)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write(folder / "tokenizer_config.json", names | (config or {}))
    return folder


def write(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))


def reference(folder: Path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def agrees(folder: Path) -> None:
    """Ids, decoding and names are those of transformers."""
    ours, theirs = open_tokenizer(folder), reference(folder)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode_prompt(text, begin=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert ours.named_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)


def added(number: int, content: str, special: bool = True) -> dict[str, object]:
    return {str(number): {"content": content, "special": special, **FLAGS}}


def test_a_tokenizer_that_begins_every_text(tmp_path):
    folder = byte_level(tmp_path, begin="<s> $A")
    agrees(folder)
    assert open_tokenizer(folder).begin_ids == [256]
    # A text that begins so itself gets no second one, where nothing else is asked for.
    assert open_tokenizer(folder).encode_prompt("<s>a") == [256, *open_tokenizer(folder).encode("a")]
    assert open_tokenizer(folder, add_bos_token=False).begin_ids == []


def test_a_tokenizer_that_begins_no_text(tmp_path):
    # Of no effect beside a tokenizer.json, in transformers too.
    folder = byte_level(tmp_path, config={"add_bos_token": True})
    agrees(folder)
    assert open_tokenizer(folder).begin_ids == []
    assert open_tokenizer(folder, add_bos_token=True).begin_ids == [256]
    write(folder / "tokenizer_config.json", {"eos_token": "</s>"})
    with pytest.raises(BadInput, match="add_bos_token is true, and no bos_token"):
        open_tokenizer(folder, add_bos_token=True)


def test_what_ends_a_text_is_not_put_before_it(tmp_path):
    assert open_tokenizer(byte_level(tmp_path, begin="<s> $A </s>")).begin_ids == [256]


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": added(258, "<|turn|>")},
        {
            "added_tokens_decoder": added(258, "<|turn|>", False) | added(259, "<|end|>"),
            "eos_token": "<|end|>",
        },
        {"added_tokens_decoder": added(258, "<think>", False), "pad_token": "</s>"},
        {"added_tokens_decoder": added(258, "<|turn|>"), "extra_special_tokens": {"image_token": "<|turn|>"}},
    ],
)
def test_tokens_that_only_the_config_names(tmp_path, config):
    agrees(byte_level(tmp_path, config=config))


def test_flags_of_the_config_hold(tmp_path):
    folder = byte_level(
        tmp_path,
        [AddedToken("<think>", special=False)],
        config={"added_tokens_decoder": added(258, "<think>")},
    )
    agrees(folder)
    assert open_tokenizer(folder).decode([258]) == ""


def test_the_special_tokens_map_is_read_where_no_decoder_is(tmp_path):
    folder = byte_level(tmp_path)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = {
        "bos_token": {"content": "<s>", **FLAGS},
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
    }
    write(folder / "special_tokens_map.json", names)
    agrees(folder)
    assert open_tokenizer(folder).eos_id == 257
    write(
        folder / "tokenizer_config.json", {"eos_token": "<s>", "added_tokens_decoder": added(258, "<|turn|>")}
    )
    assert open_tokenizer(folder).eos_id == 256


def test_added_tokens_json(tmp_path):
    folder = byte_level(tmp_path, config={"pad_token": "<pad>"})
    write(folder / "added_tokens.json", {"<|turn|>": 259, "<pad>": 258})
    agrees(folder)
    assert open_tokenizer(folder).pad_id == 258


def test_ids_that_the_library_would_number_otherwise_are_refused(tmp_path):
    folder = byte_level(tmp_path)
    write(folder / "added_tokens.json", {"<|turn|>": 300})
    with pytest.raises(BadInput, match=r"'<\|turn\|>' has the id 300 and the tokenizer gives it 258"):
        open_tokenizer(folder)
    write(folder / "added_tokens.json", {"</s>": 300})
    with pytest.raises(BadInput, match="has the id 257 in tokenizer.json and 300 in the files beside it"):
        open_tokenizer(folder)


def test_every_id_that_a_file_names_stops(tmp_path):
    folder = byte_level(tmp_path, ["<|end|>", "<|eom|>"])
    write(folder / "config.json", {"model_type": "llama", "eos_token_id": 257})
    write(folder / "generation_config.json", {"eos_token_id": [258, 259]})
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (258, (257, 258, 259))
    assert PromptTokenizer(folder).end_ids == (257, 258, 259)


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("tokenizer_config.json", {"bos_token": ["<s>"]}, "bos_token is .*; a token as a string is needed"),
        (
            "tokenizer_config.json",
            {"eos_token": "<eos>"},
            "eos_token is '<eos>', which the tokenizer does not have",
        ),
        (
            "tokenizer_config.json",
            {"eos_token": {"text": "</s>"}},
            "eos_token is .*; a token as a string is needed",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"-1": {"content": "x"}}},
            "added_tokens_decoder.-1 is",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder is no JSON object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"258": {"content": "x", "special": 1}}},
            "neither true nor false",
        ),
        ("tokenizer_config.json", {"additional_special_tokens": 3}, "a list of tokens is needed"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "true or false is needed"),
        ("added_tokens.json", {"<x>": "258"}, "a token id from 0 to"),
        ("added_tokens.json", {"<x>": 2**31}, "a token id from 0 to"),
        ("added_tokens.json", {"x" * 2000: 258}, "characters; at most 1,000 are read"),
        ("special_tokens_map.json", {"eos_token": 5}, "eos_token is 5"),
        ("generation_config.json", {"eos_token_id": "257"}, "a token id from 0 to"),
        ("generation_config.json", {"eos_token_id": [257, True]}, "a token id from 0 to"),
        ("generation_config.json", {"eos_token_id": 1e3}, "a token id from 0 to"),
        ("config.json", {"eos_token_id": -5}, "a token id from 0 to"),
        ("config.json", {"eos_token_id": [[257]]}, "a token id from 0 to"),
    ],
)
def test_values_of_the_wrong_type_are_named(tmp_path, file, values, says):
    folder = byte_level(tmp_path)
    write(folder / file, values)
    with pytest.raises(BadInput, match=says):
        open_tokenizer(folder)


def test_odd_values_that_mean_nothing_are_passed_over(tmp_path):
    folder = byte_level(tmp_path)
    write(folder / "config.json", {"eos_token_id": None, "pad_token_id": -1})  # Llama's first configs
    write(folder / "generation_config.json", {"eos_token_id": []})
    assert (open_tokenizer(folder).eos_id, open_tokenizer(folder).pad_id) == (257, None)
    # Names that the vocabulary does not have, where an id says what ends a document.
    write(folder / "config.json", {"eos_token_id": 257})
    write(
        folder / "tokenizer_config.json", {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    )
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.begin_ids) == (
        257,
        None,
        None,
        [],
    )


@pytest.fixture
def llama_like(tmp_path) -> Path:
    """The decoder of Llama 2's and Mistral's tokenizers, which takes the space from the first word."""
    words = ["\u2581Hello", "\u2581world"]
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2}
    for piece in ["\u2581", *"Helowrd", *(word[:end] for word in words for end in range(2, len(word) + 1))]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    decoding = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
    )
    return tmp_path


def test_a_continuation_keeps_its_space(llama_like):
    tokenizer = open_tokenizer(llama_like)
    prompt, new = tokenizer.encode_prompt("Hello"), tokenizer.encode_prompt("Hello world")[1:]
    assert tokenizer.decode(new) == "world"
    assert tokenizer.decode_after(prompt, new) == " world"


def test_a_continuation_of_half_a_character(tmp_path):
    tokenizer = open_tokenizer(byte_level(tmp_path))
    ids = tokenizer.encode("a你b")
    assert len(ids) == 5
    assert [tokenizer.decode_after(ids[:cut], ids[cut:]) for cut in range(1, 5)] == ["你b", "你b", "你b", "b"]


def train_bpe(path: Path, lines, **settings) -> Path:
    """A SentencePiece BPE model with byte fallback and pieces of spaces alone."""
    of_spaces = {"allow_whitespace_only_pieces": True, "hard_vocab_limit": False}
    path.write_bytes(trained_bpe(lines, vocab_size=1000, **of_spaces, **settings))
    return path


@pytest.fixture(scope="module")
def sentencepiece_bpe(tmp_path_factory, texts) -> Path:
    """As Llama 2's and Mistral's: with a space before the text."""
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    return train_bpe(path, [*texts.values()] * 3)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_prompts_of_a_sentencepiece_model_have_its_ids(sentencepiece_bpe, texts, tmp_path, kind):
    path = sentencepiece_bpe
    if kind == "gemma":
        users = ["\u2581\u2581", "\u2581\u2581\u2581", "\n\n", "<table>"]
        path = train_bpe(
            tmp_path / "gemma.model",
            [*texts.values()] * 3,
            add_dummy_prefix=False,
            user_defined_symbols=users,
        )
    tokenizer = open_tokenizer(path)
    for text in [
        *texts.values(),
        "  two  spaces   x",
        "a <table> b",
        " x",
        "\n\n\n",
        "12 345 \t 6",
        "<0x0A>",
    ]:
        assert tokenizer.with_controls.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), (
            text
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_model_without_an_equal_tokenizer_json_still_reads_text(tmp_path, texts):
    tokenizer = open_tokenizer(
        train_bpe(tmp_path / "a.model", [*texts.values()] * 3, user_defined_symbols=["<table>"])
    )
    assert tokenizer.decode(tokenizer.encode("a <table> b")) == "a <table> b"
    with pytest.raises(BadInput, match="has user-defined pieces"):
        tokenizer.encode_prompt("a")


def test_a_sentencepiece_model_with_added_tokens(sentencepiece_bpe, tmp_path, texts):
    shutil.copyfile(sentencepiece_bpe, tmp_path / "tokenizer.model")
    size = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_bpe)).get_piece_size()
    write(tmp_path / "added_tokens.json", {"<|im_end|>": size + 1, "<pad>": size})
    names = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "legacy": True,
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
    }
    write(tmp_path / "tokenizer_config.json", names)
    write(tmp_path / "config.json", {"model_type": "llama", "eos_token_id": size + 1})
    ours, theirs = open_tokenizer(tmp_path), reference(tmp_path)
    assert (ours.eos_id, ours.pad_id, ours.bos_id) == (
        theirs.eos_token_id,
        theirs.pad_token_id,
        theirs.bos_token_id,
    )
    for text in texts.values():
        assert ours.encode_prompt(text) == theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)]
    assert ours.encode_prompt("<|im_end|>") == theirs("<|im_end|>")["input_ids"]
    assert max(ours.encode("a<|im_end|>")) < size
    assert ours.decode([*ours.encode("Habari"), ours.eos_id]) == "Habari"
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.encode_prompt("a<|im_end|>b") == ours.encode_prompt("a<|im_end|>b", begin=False)
    assert (again.eos_id, again.pad_id) == (ours.eos_id, ours.pad_id)


def test_tools_and_documents_are_none_and_names_are_there(tmp_path):
    template = (
        "{% if tools is not none %}TOOLS{% endif %}{% if documents is none %}-{% endif %}{{ cls_token }}{{ "
        "image_token }}"
        "{{ pad_token is defined }}{{ messages | tojson(indent=1) }}"
    )
    extra = {"cls_token": "<s>", "extra_special_tokens": {"image_token": "</s>"}, "chat_template": template}
    folder = byte_level(tmp_path, config=extra)
    talk = [{"role": "user", "content": "Hi <&> \u1019", "name": None}]
    expected = reference(folder).apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert PromptTokenizer(folder).chat(talk) == expected
    assert "TOOLS" not in expected
    assert "name" not in expected
