"""Fixtures for all tests: tiny models, a tiny corpus, and the bridge from `transformers` models, which are
the reference.
"""

import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The address of the stand-in hub (tests/hub), which the fixture `hub` starts. It is set before
# huggingface_hub is imported, which reads it once. Until the server listens, the address refuses connections.
HUB_PORT = socket.socket()
HUB_PORT.bind(("127.0.0.1", 0))
HUB_HOME = tempfile.TemporaryDirectory(prefix="babel-hf-home-")
os.environ |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{HUB_PORT.getsockname()[1]}",
    "HF_HOME": HUB_HOME.name,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
}

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import settings

from babel_jax.config import Config, DataSettings, Family, LayerType, ModelConfig, RopeType, Source
from babel_jax.config.file import parse_settings
from babel_jax.data.tokens.sentencepiece_tokenizer import train_sentencepiece
from babel_jax.data.windows.prepare import prepare
from babel_jax.model_folders import transformers_check
from babel_jax.recipe.recipe import run_recipe
from tests import transformers_process
from tests.compiled import init_params
from tests.hub.fixtures import hub, hub_server  # noqa: F401 - fixtures for all tests

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
REAL_CHECK = transformers_check._ask
# Small programs are kept too: commands that tests start as processes find them.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# The first example of a property compiles, so a deadline for each says nothing.
settings.register_profile("compiled", deadline=None)
settings.load_profile("compiled")


def pytest_configure() -> None:
    """Under `nohup` SIGHUP is switched off, which the commands heed; tests of SIGHUP want a terminal's."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """CI has a time by which slow tests must have begun."""
    until = os.environ.get("SLOW_TESTS_UNTIL")
    if until and time.time() > float(until) and item.get_closest_marker("slow"):
        pytest.skip("CI's time is over; `make test-slow` runs it")


@pytest.fixture(scope="session", autouse=True)
def one_process_of_transformers():
    """`real_transformers_check` gives a test the program's own check."""
    with pytest.MonkeyPatch.context() as patch:
        asked = transformers_process.shared_by(transformers_check._ask)
        patch.setattr(transformers_check, "_ask", asked)
        yield


@pytest.fixture
def real_transformers_check(monkeypatch):
    monkeypatch.setattr(transformers_check, "_ask", REAL_CHECK)


@pytest.fixture(scope="session")
def hub_port():
    """The socket of the stand-in hub."""
    return HUB_PORT


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config: ModelConfig) -> Any:
    return init_params(tiny_config, jax.random.key(0))


@pytest.fixture(scope="session")
def stacked_tree() -> Callable[[Any], Any]:
    """Our parameter tree of a `transformers` model, or of its gradients."""

    def convert(tensors: dict[str, Any]) -> Any:
        single: dict[str, jax.Array] = {}
        layers: dict[str, dict[int, np.ndarray]] = {}
        for name, tensor in tensors.items():
            value = tensor.detach().float().numpy()
            parts = name.split(".")
            if parts[1] == "layers":
                layers.setdefault("/".join([*parts[:2], *parts[3:]]), {})[int(parts[2])] = value
            else:
                single["/".join(parts)] = jnp.asarray(value)
        stacked = {}
        for path, by_index in layers.items():
            in_order = [by_index[index] for index in range(len(by_index))]
            stacked[path] = jnp.asarray(np.stack(in_order))
        return traverse_util.unflatten_dict(single | stacked, sep="/")

    return convert


@pytest.fixture(scope="session")
def reference_model() -> Callable[..., Any]:
    """A `transformers` model of a ModelConfig, float32, eager attention, with every parameter random (norms
    and biases too).
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def build(config: ModelConfig, seed: int = 0, std: float = 0.1) -> Any:
        scaling = config.rope_scaling
        rope: dict[str, Any] = {"rope_type": str(scaling.rope_type), "rope_theta": config.rope_theta}
        if scaling.rope_type is not RopeType.DEFAULT:
            rope["factor"] = scaling.factor
        if scaling.rope_type is RopeType.LLAMA3:
            rope |= scaling.model_dump(
                include={"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
            )
        same = config.model_dump(
            include={
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads",
                "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            }
        )  # fmt: skip
        types = [str(LayerType.FULL if window is None else LayerType.SLIDING) for window in config.windows]
        by_layer = {
            "layer_types": types,
            "use_sliding_window": True,
            "sliding_window": config.sliding_window or 4096,
        }
        name, own = {
            Family.QWEN2: ("Qwen2", by_layer),
            Family.QWEN3: ("Qwen3", by_layer | {"attention_bias": config.qkv_bias}),
            Family.LLAMA: ("Llama", {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}),
            Family.MISTRAL: ("Mistral", {"sliding_window": config.sliding_window}),
            Family.GEMMA2: (
                "Gemma2",
                {
                    "attention_bias": config.qkv_bias,
                    "layer_types": types,
                    "sliding_window": config.sliding_window,
                    "query_pre_attn_scalar": config.query_pre_attn_scalar,
                    "attn_logit_softcapping": config.attn_logit_softcapping,
                    "final_logit_softcapping": config.final_logit_softcapping,
                },
            ),
        }[config.family]
        hf_config = getattr(transformers, f"{name}Config")(**same, rope_parameters=rope, **own)
        kind = getattr(transformers, f"{name}ForCausalLM")
        hf_config._attn_implementation = "eager"
        model = kind(hf_config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                center = 1.0 - config.norm_offset if "norm" in name else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + center)
        return model

    return build


# The first sentence of the Universal Declaration of Human Rights, article 1.
ARTICLE_1 = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "zh": "人人生而自由，在尊严和权利上一律平等。",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "bn": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "ur": "تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔",
    "id": "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "sw": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa.",
    "tl": "Ang lahat ng tao'y isinilang na malaya at pantay-pantay sa karangalan at mga karapatan.",
    "ta": ("மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும், உரிமைகளிலும் சமமானவர்கள்."),
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "jv": "Saben uwong kalairake kanthi mardika lan darbe martabat lan hak-hak kang padha.",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "ha": (
        "Su dai 'yan-adam, ana haifuwarsu ne duka 'yantattu, kuma kowannensu na da mutunci da hakkoki "
        "daidai da na kowa."
    ),
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "my": ("လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း၊ တူညီလွတ်လပ်သော အခွင့်အရေးများဖြင့် လည်းကောင်း၊ မွေးဖွားလာသူများ ဖြစ်သည်။"),
}


@pytest.fixture(scope="session")
def texts():
    """One sentence in each of the 25 languages."""
    return ARTICLE_1


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """The path of a SentencePiece model of at most 1,200 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(ARTICLE_1.values(), 1200, path)
    return path


@pytest.fixture
def write_rows():
    """Writes rows (dicts) as a .jsonl file and returns its path."""

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def parallel_rows(language, kinds=("web", "textbook"), number=40):
    """Rows whose ids are the same in every language; texts differ."""
    return [
        {
            "id": f"{kind}-{index}",
            "kind": kind,
            "text": f"{ARTICLE_1[language]} {language} {kind} {index}\n" * (1 + index % 3),
        }
        for kind in kinds
        for index in range(number)
    ]


@pytest.fixture(scope="session")
def rows_of():
    """`parallel_rows`."""
    return parallel_rows


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Sources of four languages with 40 rows of each of two kinds (Hausa: web alone, 10 rows)."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = []
    for language in ("en", "zh", "sw", "ha"):
        rows = parallel_rows(language, ("web",), 10) if language == "ha" else parallel_rows(language)
        path = folder / f"{language}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        sources.append(Source(language=language, path=str(path)))
    return tuple(sources)


@pytest.fixture(scope="session")
def small_settings(small_corpus, tmp_path_factory):
    """Settings for windows of 64 tokens of the small corpus."""
    return DataSettings(
        folder=str(tmp_path_factory.mktemp("prepared") / "data"),
        seq_len=64,
        heldout_fraction=0.1,
        sources=small_corpus,
    )


@pytest.fixture(scope="session")
def small_prepared(small_settings, small_model):
    """The folder of the small corpus, prepared; to be read only."""
    prepare(small_settings, small_model)
    return small_settings.folder


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory):
    """A folder with a byte-level BPE tokenizer of 600 tokens, made as Qwen's is, with ChatML's control
    tokens.
    """
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("chat_tokenizer")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(ARTICLE_1.values(), trainer)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def _recipe_config(out, small_settings, small_model, model, **changes):
    stage = {"schedule": {"peak": 5e-3}, "mixture": {"max_epochs": 1000.0}, "steps": 4}
    values = {
        "out": str(out),
        "model": model,
        "data": small_settings.model_dump(mode="json", exclude_none=True) | {"tokenizer": str(small_model)},
        "training": {"global_batch_size": 4, "compute_dtype": "float32", "checkpoint_every": 2},
        "evaluation": {"batch_size": 4, "max_bytes": 2000},
        "export_dtype": "float32",
        "stages": [stage | {"name": "recovery", "result": "recovered"}, stage | {"name": "continued"}],
    } | changes
    return parse_settings(Config, values, "test")


_SHAPE = {
    "vocab_size": 1280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="session")
def recipe_config():
    """Makes the config of a run of two stages of 4 steps on the small corpus: (out, settings, tokenizer,
    model, **changes).
    """
    return _recipe_config


@pytest.fixture(scope="session")
def shape():
    """Sizes of a model for the small tokenizer."""
    return _SHAPE


@pytest.fixture(scope="session")
def base(small_settings, small_prepared, small_model, tmp_path_factory):
    """The result of a run from random weights, of one stage and without expansion."""
    stage = {
        "name": "pretraining",
        "result": "base",
        "steps": 4,
        "schedule": {"peak": 5e-3},
        "mixture": {"max_epochs": 1000.0},
    }
    out = tmp_path_factory.mktemp("runs") / "base"
    return run_recipe(_recipe_config(out, small_settings, small_model, {"shape": _SHAPE}, stages=[stage]))


@pytest.fixture(scope="session")
def recipe_of_grown(base, small_settings, small_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "grown"
    changes = {
        "expansion": {"insert_after": [1, 3], "init": "zero"},
        "evaluation": {"batch_size": 4, "max_bytes": 2000, "suite_items": 2, "every": 3},
    }
    return _recipe_config(out, small_settings, small_model, {"folder": base["hf"]}, **changes)


@pytest.fixture(scope="session")
def grown(recipe_of_grown):
    """A run that expands the base by two layers of zeros and trains it through two stages."""
    return run_recipe(recipe_of_grown, compare_export=True)
