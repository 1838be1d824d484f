"""Settings: what is refused, in which words, and that the resolved config says everything."""

import pytest
from pydantic import ValidationError

from babel_jax.config import Config, ExpansionSettings, Init, ModelConfig
from babel_jax.config.file import configs_folder, load_config, parse_settings, read_toml
from babel_jax.config.quality import JudgeSettings, QualityConfig
from babel_jax.errors import BadInput

TOML = """
out = "run"
[model.shape]
vocab_size = 512
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 256
[data]
folder = "data"
seq_len = 128
sources = [{ language = "en", path = "en.jsonl" }, { language = "sw", path = "sw.jsonl" }]
[[stages]]
name = "recovery"
result = "recovered"
steps = 10
schedule = { kind = "wsd", peak = 1e-3 }
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "training.remta='full'",
            (
                "training.remta: unknown key; did you mean remat. valid keys: attention, checkpoint_every, "
                "checkpoint_minutes"
            ),
        ),
        ("stages.0.schedule.pek=1.0", "stages.0.schedule.pek: unknown key; did you mean peak."),
        ("training.global_batch_size='many'", "training.global_batch_size: Input should be a valid integer"),
        ("training.global_batch_size=0", "training.global_batch_size: Input should be greater than 0"),
        (
            "training.remat=most",
            (
                "training.remat: Input should be 'none', 'dots', 'mlp', 'gate', 'projections', 'attention' "
                "or 'full'"
            ),
        ),
        (
            "data.sources.0.off=['evaluation']",
            "data.sources.0.off.0: Input should be 'characters', .* or 'language'.*given: 'evaluation'",
        ),
        (
            "data.cleaning.off=['evaluation']",
            "data.cleaning.off.0: Input should be 'characters', .* or 'language'.*given: 'evaluation'",
        ),
        (
            "model.shape.num_key_value_heads=3",
            "num_attention_heads = 4 is not divisible by num_key_value_heads = 3; valid.* .1, 2, 4",
        ),
        (
            "model.shape.sliding_window=64",
            "sliding_window = 64 is of no layer; layer_types says which are sliding_attention",
        ),
        ("data.seq_len=512", "data.seq_len = 512 exceeds model.shape.max_position_embeddings = 256"),
        ("stages.0.mixture.languages=['en','sww']", "unknown language 'sww'.* did you mean.* sw"),
        (
            "stages.0.mixture.languages=['th']",
            "mixture of 'recovery' names th, which data.sources has no source for; there are.* en sw",
        ),
        ("stages.0.tokens=5", "give exactly one of tokens and steps"),
        (
            "training.gradient_accumulation=3",
            "global_batch_size = 8 is not divisible by gradient_accumulation = 3; valid",
        ),
        ("model.folder=x", "give exactly one of folder .* and shape"),
        ("training.keep_every=700", "keep_every = 700 is not a multiple of checkpoint_every = 500"),
        ("training.local_checkpoints=gs://b/x", "local_checkpoints = gs://b/x must be a folder on the disk"),
        (
            "training={local_checkpoints='/x', checkpoint_every=50}",
            "local_checkpoint_every = 50 is not less than checkpoint_every = 50",
        ),
        (
            "training={local_checkpoints='/x', offload_optimizer_state=true}",
            "local_checkpoints and offload_optimizer_state exclude each other",
        ),
        ("seed=4294967296", "seed: Input should be less than 4294967296"),
        ("optimizer.b2=1.0", "optimizer.b2: Input should be less than 1"),
        ("model.shape.hidden_size=2", "head_dim = 0; rotary positions need an even one of 2 or more"),
        ("stages.0.result='a/b'", "stages.0.result: String should match pattern"),
        ("seed", "--set seed: not of the form key=value"),
        ("stages.4.steps=1", "4 must be a number from 0 to 0"),
        ("stages.².steps=1", "² must be a number from 0 to 0"),
        (f"stages.{'9' * 5000}.steps=1", "9 must be a number from 0 to 0"),
        (f"stages.0.name='{'x' * 101}'", "stages.0.name: String should have at most 100 characters"),
        (
            "stages=[" + "{name='a', steps=1, schedule={peak=1e-3}}," * 257 + "]",
            "stages: Tuple should have at most 256 items",
        ),
        ("seed.x=1", "(seed is a single value|seed: Input should be a valid integer)"),
    ],
)
def test_what_does_not_fit_is_named(path, override, words):
    overrides = ("seed=0", override) if override.startswith("seed.") else (override,)
    with pytest.raises(BadInput, match=words) as raised:
        load_config(path, overrides)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(BadInput, match="none.toml: no such config file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("out = ")
    with pytest.raises(BadInput, match="bad.toml: not a readable TOML file: .*at end of document"):
        load_config(tmp_path / "bad.toml")


def test_a_missing_key_is_named(path):
    path.write_text(TOML.replace("vocab_size = 512\n", ""))
    with pytest.raises(BadInput, match=r"run.toml: model.shape.vocab_size: missing; this key is needed$"):
        load_config(path)


def test_the_resolved_config_gives_itself_back(path, tmp_path):
    config = load_config(
        path, ("training.mesh={data=2, fsdp=-1}", "seed=7", "stages.0.mixture.curated={en=0.1}")
    )
    config.save(tmp_path / "resolved.toml")
    assert load_config(tmp_path / "resolved.toml") == config
    assert config.seed == 7
    assert config.data.folder.startswith("/")


@pytest.mark.parametrize("name", [path.name for path in sorted(configs_folder().glob("*.toml"))])
def test_shipped_configs_are_valid(name):
    values = read_toml(configs_folder() / name)
    if "classifier" in values:
        # Names and questions are the defaults, written out to be changed.
        assert parse_settings(QualityConfig, values, name).judge.dimensions == JudgeSettings().dimensions
    else:
        assert parse_settings(Config, values, name).stages


def test_points_of_a_run_have_different_names(path):
    path.write_text(
        TOML[: TOML.index("[model.shape]")] + '[model]\nfolder = "x"\n' + TOML[TOML.index("[data]") :]
    )
    assert load_config(path).stages[0].result == "recovered"
    with pytest.raises(BadInput, match="results must differ, also from base and expanded; given base"):
        load_config(path, ("stages.0.result=base",))


def test_a_model_config_can_be_a_static_argument(path):
    shape = load_config(path).model.shape
    assert isinstance(shape, ModelConfig)
    assert hash(shape) == hash(shape.model_copy())
    assert shape.with_layers((0, 0, 1)).num_hidden_layers == 3


@pytest.mark.parametrize("given", ["noise", Init.NOISE])
def test_a_word_is_taken_where_a_setting_is_one_of_some(given):
    assert ExpansionSettings(append=2, init=given).init is Init.NOISE


@pytest.mark.parametrize("given", ["nois", "NOISE", "", 1, None, True])
def test_other_words_are_refused(given):
    with pytest.raises(ValidationError, match="'copy', 'noise', 'zero', 'average', 'identity' or 'scaled'"):
        ExpansionSettings(append=2, init=given)


def test_a_key_of_very_many_parts_is_refused_before_it_is_read(path):
    # tomllib takes 15 seconds and 4 GB for 50,000 parts.
    key = ".".join(["a"] * 50_000)
    path.write_text(path.read_text() + f"\n{key} = 1\n")
    with pytest.raises(BadInput, match="a line with more than 5,000 dots, which no config has"):
        load_config(path)
