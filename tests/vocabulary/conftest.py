"""Small tokenizers of each kind, made by the libraries that make published ones, and models of them."""

import json

import jax
import pytest
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from babel_jax.config import Config, ModelConfig
from babel_jax.config.file import parse_settings
from babel_jax.data.sources.embedded import embedded_corpus, embedded_folder
from babel_jax.data.tokens.sentencepiece_tokenizer import train_sentencepiece
from babel_jax.model_folders.folder import Format
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import save_folder
from babel_jax.recipe.recipe import run_recipe
from tests.compiled import init_params
from tests.sentencepiece_models import trained_bpe

# The pattern of Qwen2's published tokenizer.json.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CODES = ("en", "ta", "my")
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session")
def corpus():
    """The package's text in 25 languages."""
    return {code: [row.text for row in rows] for code, rows in embedded_corpus().items()}


@pytest.fixture(scope="session")
def qwen_files(corpus, tmp_path_factory):
    """A tokenizer as Qwen's: byte-level BPE of English, NFC, and chat tokens after the vocabulary."""
    folder = tmp_path_factory.mktemp("qwen")
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(corpus["en"], trainer)
    made.add_special_tokens(list(CHAT))
    made.save(str(folder / "tokenizer.json"))
    description = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(description["model"]["vocab"]))
    merges = [" ".join(pair) for pair in description["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(made.token_to_id(token)): {"content": token, **flags} for token in CHAT}
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, **named})
    )
    return folder


@pytest.fixture(scope="session")
def sentencepiece_bpe(corpus):
    """Trains a BPE of characters with byte fallback on English; gives the bytes of its tokenizer.model."""

    def train(**settings):
        return trained_bpe("\n".join(corpus["en"]).split("\n"), vocab_size=900, **settings)

    return train


@pytest.fixture(scope="session")
def llama_files(sentencepiece_bpe, tmp_path_factory):
    """A tokenizer.model as Llama 2's, with a space before the text."""
    folder = tmp_path_factory.mktemp("llama")
    # Mistral's published model has this score for its rare characters.
    proto = ModelProto.FromString(sentencepiece_bpe(split_digits=True))
    for piece in proto.pieces:
        if piece.type == ModelProto.SentencePiece.NORMAL and len(piece.piece) == 1:
            piece.score = -1e9
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


@pytest.fixture(scope="session")
def unigram_files(corpus, tmp_path_factory):
    """A tokenizer.model as the demo trains: unigram with byte fallback."""
    folder = tmp_path_factory.mktemp("unigram")
    train_sentencepiece(corpus["en"], 900, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def files_of(qwen_files, llama_files, unigram_files):
    """The folder of a kind of tokenizer."""
    return {"qwen": qwen_files, "llama": llama_files, "unigram": unigram_files}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Writes a tiny model of a tokenizer's folder; rows: of its embedding."""

    def make(files, rows, format=Format.HF, **changes):
        shape = ModelConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            **changes,
        )
        params = init_params(shape, jax.random.key(0))
        folder = tmp_path_factory.mktemp("model") / "model"
        save_folder(folder, format, params, write_hf_config(shape, eos_token_id=2), files)
        return folder

    return make


@pytest.fixture(scope="session")
def settings_of(make_model, qwen_files, tmp_path_factory):
    """Makes the config of a run that extends its vocabulary; changes are by top-level key."""
    folder = tmp_path_factory.mktemp("run")
    model = make_model(qwen_files, 640)

    def make(**changes):
        mixture, schedule = {"max_epochs": 1000.0}, {"peak": 1e-2}
        stages = [
            {"name": "rows", "steps": 2, "train": "new_rows", "mixture": mixture, "schedule": schedule},
            {"name": "all", "steps": 2, "mixture": mixture, "schedule": schedule},
        ]
        values = {
            "out": str(folder / "run"),
            "export_dtype": "float32",
            "model": {"folder": str(model)},
            "vocabulary": {"languages": ["my", "ta"], "tokens": 80, "least": 2, "multiple": 64},
            "expansion": {"insert_after": [0], "init": "identity"},
            "data": {
                "folder": str(folder / "data"),
                "seq_len": 64,
                "heldout_fraction": 0.2,
                "sources": [
                    {"language": code, "path": str(embedded_folder() / f"{code}.jsonl")} for code in CODES
                ],
            },
            "training": {"global_batch_size": 4, "compute_dtype": "float32"},
            "evaluation": {"max_bytes": 1500},
            "stages": stages,
        }
        for key, change in changes.items():
            values[key] = {**values[key], **change} if isinstance(values.get(key), dict) else change
        return parse_settings(Config, values, "test")

    return make


@pytest.fixture(scope="session")
def done(settings_of):
    """The result of that run."""
    return run_recipe(settings_of(), compare_export=True)
