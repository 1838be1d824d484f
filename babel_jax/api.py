"""The Python interface: the names of `import babel_jax`. Each function does the same as the command of its
name.

Settings may be an object of their class, a dict of plain values as in a TOML file, or, for a whole run, the
path of a TOML file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

# A name imported as itself is a public name of this module.
from babel_jax.config import Config, DataSettings, ExpansionSettings, Settings
from babel_jax.config import ModelConfig as ModelConfig
from babel_jax.config.file import load_config, parse_settings
from babel_jax.errors import BadInput
from babel_jax.expansion.plan import ExpansionPlan
from babel_jax.model_folders.folder import ModelFolder as ModelFolder
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params as load_params
from babel_jax.model_folders.params import save_folder as save_folder

_S = TypeVar("_S", bound=Settings)


def convert(
    source: Path | str, destination: Path | str, to: str | None = None, **options: Any
) -> dict[str, Any]:
    """Writes a model folder in the other format, or in the format `to` ("hf" or "orbax"); every tensor is the
    same to the bit.

    options: those of `model_folders.folder.transfer`, for example `verify=True`. Returns the figures of
    `babel convert --json`. Raises BadInput for a folder that is no model folder, and for a destination that
    is not empty.
    """
    from babel_jax.model_folders.folder import Format
    from babel_jax.model_folders.transfer import convert as convert_folder

    if to is not None and to not in list(Format):
        raise BadInput(f"convert: to = {to!r} is no format; valid: {', '.join(Format)}")
    return convert_folder(source, destination, Format(to) if to is not None else None, **options)


def expand(
    source: Path | str,
    destination: Path | str,
    plan: ExpansionPlan | ExpansionSettings | Mapping[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """Writes a deeper model folder. `plan` chooses the layers to copy: a plan, settings, or a dict such as
    {"insert_after": [14, 16]}.

    Returns the figures of `babel expand --json`, with `new_layers`. Raises BadInput for a plan that does not
    fit the model.
    """
    from babel_jax.expansion.folders import expand_folder
    from babel_jax.expansion.plan import plan_from_settings

    if not isinstance(plan, ExpansionPlan):
        settings = _settings(ExpansionSettings, plan, "expand")
        plan = plan_from_settings(settings, open_folder(source).config.num_hidden_layers)
    return expand_folder(source, destination, plan, **options)


def prepare(
    settings: DataSettings | Mapping[str, Any], tokenizer: Path | str | None = None
) -> dict[str, Any]:
    """Cleans and packs text, and stores it as windows of token ids in `settings.folder`; a call that was
    stopped is resumed.

    tokenizer: a model folder or a tokenizer file, used if the settings name none. Returns the counts by
    language.
    """
    from babel_jax.data.windows.prepare import prepare as prepare_folder

    return prepare_folder(_settings(DataSettings, settings, "prepare"), tokenizer)


def train(config: Config | Mapping[str, Any] | Path | str) -> dict[str, Any]:
    """Runs or resumes the whole recipe: expansion, the stages, evaluation at each point, export. For a
    finished run, returns its summary.

    config: a `Config`, a dict, or the path of a TOML file. Returns {"out", "hf", "bits_per_byte", "means",
    "summary", ...}.
    """
    from babel_jax.recipe.recipe import run_recipe

    return run_recipe(_run_config(config))


def evaluate(
    model: Path | str,
    tasks: Sequence[str] = ("bits_per_byte",),
    *,
    languages: Sequence[str] | None = None,
    data: Path | str | None = None,
    baselines: Sequence[Path | str] = (),
    out: Path | str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model folder, and compares it with the `baselines`.

    data: a folder of text and benchmarks; None for the package's text, and the hub's benchmarks. options:
    `few_shot`, `limit`, `max_bytes` and `chat`. Returns {"tasks": {task: {language: {"score", "stderr",
    "n"}}}, "means", "missing", "summary", ...}.
    """
    from babel_jax.evaluation.benchmarks.evaluate import Request
    from babel_jax.evaluation.benchmarks.evaluate import evaluate as evaluate_models
    from babel_jax.places import fetched
    from babel_jax.sending import output

    request = Request(
        tasks=tuple(tasks),
        languages=tuple(languages) if languages is not None else None,
        data=fetched(data) if data is not None else None,
        **options,
    )
    folder = output(out) if out is not None else None
    return evaluate_models(str(model), [str(path) for path in baselines], request, folder)


def generate(
    model: Path | str,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The continuation of a prompt by the model in a folder.

    `temperature` 0 takes the likeliest token at each position.
    """
    from babel_jax.inference.generate import generate_text

    result: str = generate_text(str(model), prompt, max_new_tokens, temperature, top_p, seed)["text"]
    return result


def plan(config: Config | Mapping[str, Any] | Path | str, topology: str, slices: int = 1) -> dict[str, Any]:
    """The memory and time of a run on a TPU topology such as "v5p:4x4x4", from its programs compiled for it.
    It needs libtpu, but no TPU.
    """
    from babel_jax.tpu.plan import plan as plan_run

    return plan_run(_run_config(config), topology, slices)


def _run_config(config: Config | Mapping[str, Any] | Path | str) -> Config:
    if isinstance(config, Path | str):
        return load_config(config)
    return _settings(Config, config, "config")


def _settings(kind: type[_S], given: _S | Mapping[str, Any], location: str) -> _S:
    return given if isinstance(given, kind) else parse_settings(kind, dict(given), location)
