"""A first config for the user's model and languages: complete, with comments, valid for every command."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from babel_jax.config import Config, ModelConfig, Source
from babel_jax.config.file import parse_settings
from babel_jax.config.settings import Choice
from babel_jax.data.sources.embedded import corpus_sources
from babel_jax.errors import BadInput, one_line
from babel_jax.expansion.plan import spread_layers
from babel_jax.files import write_text
from babel_jax.languages import language
from babel_jax.model.decoder import count_parameters
from babel_jax.model_folders.folder import open_folder


class Device(Choice):
    """The device of the run: a laptop, one GPU, or the chips of one TPU slice."""

    CPU = "cpu"
    GPU = "gpu"
    TPU = "tpu"


class _Sizes(NamedTuple):
    """Settings that follow from the device. micro_batch: the number of windows computed at a time."""

    seq_len: int
    batch: int
    micro_batch: int
    tokens: int
    compute_dtype: str
    says: str


_SIZES = {
    Device.CPU: _Sizes(256, 8, 8, 1_000_000, "float32", "a laptop: small windows, float32"),
    Device.GPU: _Sizes(2048, 64, 4, 200_000_000, "bfloat16", "one GPU: bfloat16, 4 windows at a time"),
    Device.TPU: _Sizes(4096, 256, 256, 2_000_000_000, "bfloat16", "a TPU slice: bfloat16, all chips"),
}
# The most parameters of a model, and the peak learning rate for it.
_RATES = ((500_000_000, 3e-4), (3_000_000_000, 1e-4), (10**18, 2e-5))
# The default number of new layers for each layer of the model: 6 for 28, as in Babel-9B.
_SHARE_OF_NEW_LAYERS = 6 / 28
_FOLDERS = ("run", "data")


def first_config(
    path: Path,
    model: str,
    data: str,
    languages: Sequence[str] = (),
    new_layers: int | None = None,
    device: Device = Device.CPU,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Writes a config for `model` (a model folder) and the text in `data` (xx.jsonl files) to `path`.

    languages: by default all languages of `data`. new_layers: by default 6 for every 28 layers. tokens: the
    budget of both stages. Returns {"config", "languages", "layers", "new_layers", "tokens", "summary"}.
    Raises BadInput for a file that exists, a folder that is no model, languages without text, and more new
    layers than the model has layers.
    """
    if path.exists():
        raise BadInput(f"{path}: it is there already; give another --out")
    config = open_folder(model).config
    sources = _chosen(corpus_sources(data), languages, data)
    depth = config.num_hidden_layers
    count = round(depth * _SHARE_OF_NEW_LAYERS) if new_layers is None else new_layers
    count = max(1, count)
    places = spread_layers(count, depth)
    sizes = _SIZES[device]
    budget = tokens or sizes.tokens
    for written in (str(path), model, *(str(source.path) for source in sources)):
        if not _is_unicode(written):
            raise BadInput(f"{written}: a path that is not UTF-8, which no config can hold; rename it")
    text = _text(path.name, model, config, sources, places, device, budget)
    # The other commands read this text, so a mistake in it must show now.
    parse_settings(Config, tomllib.loads(text), str(path))
    write_text(path, text)
    codes = [source.language for source in sources]
    return {
        "config": str(path),
        "languages": codes,
        "layers": depth,
        "new_layers": count,
        "tokens": budget,
        "summary": (
            f"{path}: {depth} layers become {depth + count}; {budget:,} tokens of {', '.join(codes)}\n"
            f"next: babel prepare {path}   # text to windows of tokens\n"
            f"      babel mixture {path}   # how often each language is read, before anything is trained\n"
            f"      babel train {path}     # resumes where it was stopped"
        ),
    }


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def _quoted(text: str) -> str:
    """A text as a TOML string. JSON's escapes are not TOML's: it writes letters beyond 16 bits as pairs."""
    return tomli_w.dumps({"x": text}).removeprefix("x = ").rstrip("\n")


def _chosen(sources: Sequence[Source], languages: Sequence[str], data: str) -> list[Source]:
    """The sources of these languages, in the order of `sources`."""
    wanted = {language(code).code for code in languages} or {source.language for source in sources}
    missing = sorted(wanted - {source.language for source in sources})
    if missing:
        there = ", ".join(source.language for source in sources)
        raise BadInput(
            f"{data}: no text in {', '.join(missing)}: a file {missing[0]}.jsonl with one object a line is "
            f"needed; there is {there}"
        )
    return [source for source in sources if source.language in wanted]


def _text(
    file_name: str,
    model: str,
    config: ModelConfig,
    sources: Sequence[Source],
    places: Sequence[int],
    device: Device,
    tokens: int,
) -> str:
    sizes = _SIZES[device]
    seq_len = min(sizes.seq_len, config.max_position_embeddings)
    parameters = count_parameters(config)
    peak = next(rate for most, rate in _RATES if parameters <= most)
    run, prepared = (_quoted(f"runs/{Path(file_name).stem}/{folder}") for folder in _FOLDERS)
    # A comment ends with its line.
    shown_name = one_line(file_name, 200)
    source_tables = "\n".join(
        f"[[data.sources]]\nlanguage = {_quoted(source.language)}\npath = {_quoted(str(source.path))}\n"
        for source in sources
    )
    has_english = any(source.language == "en" for source in sources) and len(sources) > 1
    extra = ", curated_extra = { en = 0.15 }" if has_english else ""
    english = (
        "# curated_extra: English gets 15% of the tokens on top of its own part. The model knows English "
        "best,\n"
        "# so it recovers with it.\n"
        if has_english
        else ""
    )
    recovery = max(1, tokens // 3)
    accumulation = sizes.batch // sizes.micro_batch
    depth = config.num_hidden_layers
    return f"""# {one_line(model, 200)}: grown from {depth} to {depth + len(places)} layers, then trained on.
#
#   babel prepare {shown_name}   # text to windows of tokens
#   babel mixture {shown_name}   # shares and passes of each language, before anything is trained
#   babel train {shown_name}     # resumes where it was stopped
#
# Change settings here, or for one start with --set, such as --set seed=1.
out = {run}

# The model to begin with. It has {parameters:,} parameters.
[model]
folder = {_quoted(model)}

# New layers are copies of {", ".join(map(str, places))} (counted from 0), each after its source: every other
# layer from the middle on, as in Babel-9B. They begin with a little noise, as there.
[expansion]
new_layers = {len(places)}
init = "noise"
noise_mean = 0.0001
noise_std = 0.0001

# Text: files with one JSON object a line that has a "text". 5% is held out, to measure with.
[data]
folder = {prepared}
seq_len = {seq_len}
heldout_fraction = 0.05
bad_rows = "skip"

{source_tables}
# For {sizes.says}.
# global_batch_size: windows of a step; gradient_accumulation: the parts that a step is computed in.
[training]
global_batch_size = {sizes.batch}
gradient_accumulation = {accumulation}
compute_dtype = "{sizes.compute_dtype}"
checkpoint_minutes = 10.0

[evaluation]
batch_size = {sizes.micro_batch}
max_bytes = 20000

# Stage 1, recovery: all languages as equal as their text allows.
{english}# max_epochs: no language is read more often than that, so that little text is not learned by heart
# (Muennighoff et al. 2023: up to four passes are nearly as good as new text).
[[stages]]
name = "recovery"
result = "recovered"
tokens = {recovery:_}
max_passes = 4.0
schedule = {{ kind = "wsd", peak = {peak:g}, warmup_fraction = 0.05, final_fraction = 0.3 }}
mixture = {{ strategy = "equal", max_epochs = 4.0{extra} }}

# Stage 2: more of the languages with little text.
[[stages]]
name = "continued"
result = "continued"
tokens = {tokens - recovery or 1:_}
max_passes = 4.0
schedule = {{ kind = "cosine", peak = {peak:g}, warmup_fraction = 0.02, final_fraction = 0.1 }}
mixture = {{ strategy = "temperature", temperature = 5.0, max_epochs = 4.0{extra} }}
"""
