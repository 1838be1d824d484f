"""A first config for the user's model and languages: complete, with comments, valid for every command."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
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
_LONGEST_NAME = 200  # characters of a file's name in a comment


def first_config(
    path: Path,
    model: str,
    data: str,
    languages: Sequence[str] = (),
    new_layers: int | None = None,
    device: Device = Device.CPU,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Writes a config for `model` (a model folder, or a model on the hub) and the text in `data` (xx.jsonl
    files) to `path`.

    languages: by default all languages of `data`. new_layers: by default 6 for every 28 layers. tokens: the
    budget of both stages. Returns {"config", "languages", "layers", "new_layers", "tokens", "summary"}.
    Raises BadInput for a file that exists, a folder that is no model, languages without text, and more new
    layers than the model has layers.
    """
    if path.exists():
        raise BadInput(f"{path}: it is there already; give another --out")
    config = open_folder(model, weights=False).config
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
    """The config, as the template in this folder has it."""
    sizes = _SIZES[device]
    parameters = count_parameters(config)
    peak = next(rate for most, rate in _RATES if parameters <= most)
    run, prepared = (f"runs/{Path(file_name).stem}/{folder}" for folder in _FOLDERS)
    has_english = any(source.language == "en" for source in sources) and len(sources) > 1
    # A third of the budget for recovery, the rest for continued training.
    recovery = max(1, tokens // 3)
    return _template().render(
        # Names in comments: a comment ends with its line.
        file_name=one_line(file_name, _LONGEST_NAME),
        model=one_line(model, _LONGEST_NAME),
        folder=model,
        run=run,
        prepared=prepared,
        depth=config.num_hidden_layers,
        parameters=parameters,
        places=places,
        sources=sources,
        sizes=sizes,
        seq_len=min(sizes.seq_len, config.max_position_embeddings),
        peak=f"{peak:g}",
        extra=", curated_extra = { en = 0.15 }" if has_english else "",
        recovery=recovery,
        continued=tokens - recovery or 1,
    )


def _template() -> jinja2.Template:
    # A TOML file is no HTML: values are escaped by the filter `toml`.
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("babel_jax.recipe", "."),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["toml"] = _quoted
    return templates.get_template("first_config.toml.jinja")
