"""The ablation of the Babel report (arXiv 2503.00865, table of positions and initializations): every variant
of new layers, before training and after a given budget, against the unexpanded parent with the same tokens
and with the same compute.

Files in its folder:

    data/              the prepared text, with the model's tokenizer
    runs/              the run folder of the variant that is being trained
    results/X-S.json   the figures of variant X with seed S; an existing file is not computed again
    ablation.*         table (.md), figures (.json) and plot (.png)
"""

import functools
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from babel_jax.claims import changes, is_begun
from babel_jax.config import Config, ExpansionSettings, Init, ModelConfig, ScheduleKind, Stage, Trained
from babel_jax.config.file import shipped_config
from babel_jax.data.sources.embedded import corpus_sources, embedded_folder
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import is_prepared, open_prepared
from babel_jax.errors import BadInput
from babel_jax.evaluation.bits_per_byte import TextToScore, scored_bits, text_to_score
from babel_jax.evaluation.scoring import score
from babel_jax.expansion.apply import expanding
from babel_jax.expansion.folders import expand_config
from babel_jax.expansion.plan import ExpansionPlan, plan_from_settings
from babel_jax.files import make_folder, read_json, write_text
from babel_jax.hub.names import hub_name
from babel_jax.model.flops import model_flops_per_token
from babel_jax.model_folders.folder import open_folder, source_name
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.run_files import AblationResult, StepLine, read_as, read_lines
from babel_jax.studies.ablation_report import write_ablation
from babel_jax.studies.packed_text import encode
from babel_jax.studies.sensitivity import layers_to_double, sensitivity
from babel_jax.training.compilation import compiled_in
from babel_jax.training.deepening import Depth
from babel_jax.training.mesh import make_mesh, param_shardings
from babel_jax.training.run import train_stages

log = logging.getLogger("babel")

UNEXPANDED = "parent"
# The report gives only the mean of its noise; here the standard deviation has the same value.
INITS: dict[str, dict[str, Any]] = {
    "copy": {"init": Init.COPY},
    "noise-small": {"init": Init.NOISE, "noise_mean": 1e-4, "noise_std": 1e-4},
    "noise-large": {"init": Init.NOISE, "noise_mean": 1e-2, "noise_std": 1e-2},
    "zero": {"init": Init.ZERO},
    "identity": {"init": Init.IDENTITY},
    "scaled": {"init": Init.SCALED},
    "average": {"init": Init.AVERAGE},
}
POSITIONS = ("among", "after", "auto")
NEW_FIRST, NEW_RATE = "new-first", "new-rate"
TRAININGS = (NEW_FIRST, NEW_RATE)
_NEW_FIRST_FRACTION = 0.25
_NEW_RATE_FACTOR = 3.0
DEFAULT = (
    "among:copy",
    "among:noise-small",
    "among:noise-large",
    "after:copy",
    "after:noise-small",
    "after:noise-large",
    "among:zero",
    "among:identity",
    "among:scaled",
    "among:average",
    "auto:copy",
    f"among:copy:{NEW_FIRST}",
    f"among:copy:{NEW_RATE}",
    f"among:identity:{NEW_FIRST}",
    f"among:identity:{NEW_RATE}",
    UNEXPANDED,
    f"{UNEXPANDED}:compute",
)


class Study(NamedTuple):
    """The settings, model and text that all variants share."""

    config: Config
    model_config: ModelConfig
    params: PyTree[Array]
    tokenizer: Tokenizer
    texts: dict[str, list[str]]
    heldout: TextToScore
    new_layers: int


def ablate(
    model: str,
    data: str | None,
    out: Path,
    *,
    variants: Sequence[str] = DEFAULT,
    new_layers: int | None = None,
    tokens: int = 0,
    seeds: Sequence[int] = (0,),
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Evaluates every variant with every seed, before training and, if `tokens` > 0, after training on so
    many tokens. A stopped study resumes.

    A variant is `position:init` (POSITIONS and INITS), or this with `:new-first` (only the new layers are
    trained for the first quarter of the steps) or `:new-rate` (their learning rate is three times that of the
    others), `parent` (the unexpanded model, trained on the same tokens) or `parent:compute` (trained with the
    same FLOPs). Without `new_layers`, every other layer of the second half is copied, except the last two, as
    in Babel-9B. `overrides` are settings of configs/ablation.toml. Raises BadInput for arguments that do not
    fit.
    """
    # A variant that is misspelled is told now, and not after hours of the others.
    for variant in variants:
        _check(variant)
    study = _prepared(model, data, out, new_layers, tokens, overrides)
    results: list[dict[str, Any]] = []
    # All variants of one depth compile the same train step.
    with compiled_in(out / "compiled"):
        base = _bits_per_byte(study, study.model_config, study.params)
        # Seed by seed: a study that is stopped has all variants with the first seeds, and can be compared.
        for seed in seeds:
            for variant in variants:
                path = out / "results" / f"{variant.replace(':', '-')}-{seed}.json"
                if not path.is_file():
                    log.info("variant %s, seed %d", variant, seed)
                    path.parent.mkdir(exist_ok=True)
                    result = _result(study, variant, seed, tokens, out / "runs")
                    write_text(path, json.dumps(result, indent=2) + "\n")
                results.append(read_as(path, AblationResult))
    result = {
        "model": model,
        "new_layers": study.new_layers,
        "tokens": tokens,
        "base": base,
        "results": results,
    }
    return write_ablation(out, result, study.model_config.num_hidden_layers)


def _check(variant: str) -> None:
    """Raises BadInput for an unknown variant."""
    if variant in (UNEXPANDED, f"{UNEXPANDED}:compute"):
        return
    position, init, training = _parts(variant)
    if position not in POSITIONS or init not in INITS or training not in ("", *TRAININGS):
        known = (
            f"POSITION:INIT with a position of {', '.join(POSITIONS)} and an init of {', '.join(INITS)}, "
            f"and after that :{' or :'.join(TRAININGS)}"
        )
        raise BadInput(
            f"variant {variant!r} is not known; give {UNEXPANDED}, {UNEXPANDED}:compute or {known}"
        )


def _parts(variant: str) -> tuple[str, str, str]:
    """Position, init and training of a variant; the last is empty if the variant does not name it."""
    position, _, rest = variant.partition(":")
    init, _, training = rest.partition(":")
    return position, init, training


def _prepared(
    model: str, data: str | None, out: Path, new_layers: int | None, tokens: int, overrides: tuple[str, ...]
) -> Study:
    """Claims `out` for a study with these arguments, and prepares its text there."""
    folder = open_folder(model)
    model = source_name(folder.path) if hub_name(model) is not None else str(Path(model).resolve())
    check_vocabulary(folder.path, folder.config.vocab_size)
    sources = []
    for source in corpus_sources(data or embedded_folder()):
        sources.append(source.model_dump(mode="json", exclude_none=True))
    settings = {
        "out": str(out),
        "model": {"folder": model},
        "data": {"folder": str(out / "data"), "tokenizer": model, "sources": sources},
    }
    config = shipped_config("ablation.toml", settings, overrides)

    # By default as many layers as Babel-9B adds: every other one of the second half.
    depth = folder.config.num_hidden_layers
    new_layers = new_layers or len(range(depth // 2, depth - 2, 2)) or 1
    if new_layers > depth:
        raise BadInput(f"--new-layers {new_layers}: the model has {depth} layers to copy")
    if config.data.seq_len > folder.config.max_position_embeddings:
        raise BadInput(
            f"data.seq_len = {config.data.seq_len} exceeds the model's "
            f"{folder.config.max_position_embeddings} positions"
        )

    make_folder(out)
    _claim(
        out,
        {
            "model": model,
            "data": data,
            "new_layers": new_layers,
            "tokens": tokens,
            "set": list(overrides),
        },
    )
    # A study that is resumed keeps its prepared text.
    if not is_prepared(config.data.folder):
        prepare(config.data, config.model.folder)
    tokenizer = open_tokenizer(folder.path, config.data.add_bos_token)
    prepared = open_prepared(config.data.folder)
    prepared.check_tokenizer(tokenizer, config.data.conversations)
    texts = {}
    for code in prepared.languages:
        texts[code] = [row.text for row in prepared.heldout(code)]
    heldout = text_to_score(
        tokenizer, texts, folder.config.max_position_embeddings, config.evaluation.max_bytes
    )
    shardings = param_shardings(folder.config, make_mesh(config.training.mesh))
    params = load_params(folder, dtype=jnp.float32, shardings=shardings)
    return Study(config, folder.config, params, tokenizer, texts, heldout, new_layers)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new study. Raises BadInput if `out` was begun with other settings."""
    path = out / "settings.json"
    if is_begun(out, path.name, "a folder of a study", "--out"):
        changed = [change.key for change in changes(read_json(path), settings)]
        if changed:
            raise BadInput(
                f"{out}: begun with another {', '.join(changed)} (see {path}); give another --out, or remove "
                "this one"
            )
    write_text(path, json.dumps(settings, indent=2) + "\n")


def _result(study: Study, variant: str, seed: int, tokens: int, runs: Path) -> dict[str, Any]:
    """The figures of one variant with one seed; its run folder is removed afterwards."""
    plan = _plan(study, variant, seed)
    deeper = expand_config(study.model_config, plan) if plan is not None else study.model_config

    def params() -> PyTree[Array]:
        # Training donates its arrays: it would leave nothing for the next variant, so it gets a copy.
        if plan is None:
            return jax.tree.map(jnp.copy, study.params)
        return expanding(param_shardings(deeper, make_mesh(study.config.training.mesh)))(study.params, plan)

    # The expanded model before training shows what the expansion alone costs.
    before = _bits_per_byte(study, deeper, params())
    result: dict[str, Any] = {"variant": variant, "seed": seed, "before": before}
    if plan is not None:
        result["layers"] = list(plan.source_layers)
    if not tokens:
        return result

    def evaluate_stage(_: Stage, __: ModelConfig, trained: PyTree[Array]) -> None:
        # After each stage: the last one's figures stay.
        result["after"] = _bits_per_byte(study, deeper, trained)

    run_folder = runs / f"{variant.replace(':', '-')}-{seed}"
    run_folder.mkdir(parents=True, exist_ok=True)
    steps = _steps(study, variant, tokens)
    config = _training_config(study, variant, seed, steps, run_folder)
    models = [Depth(0, deeper, plan.new_layers if plan is not None else ())]
    train_stages(config, models, params, run_folder, evaluate_stage)
    result["steps"] = steps
    result["losses"] = [line["loss"] for line in read_lines(run_folder / "metrics.jsonl", StepLine)]
    # Its checkpoints would fill the disk after a few variants.
    shutil.rmtree(run_folder)
    return result


def _steps(study: Study, variant: str, tokens: int) -> int:
    """The steps that a variant is trained for."""
    # `parent:compute` gets the steps that the deeper model's FLOPs would pay for.
    steps = max(1, round(tokens / study.config.training.global_batch_size / study.config.data.seq_len))
    if variant == f"{UNEXPANDED}:compute":
        steps = round(steps * _relative_flops(study))
    return steps


def _training_config(study: Study, variant: str, seed: int, steps: int, run_folder: Path) -> Config:
    """The settings with which a variant is trained."""
    training = _parts(variant)[2]
    rate = {"new_layers_rate": _NEW_RATE_FACTOR} if training == NEW_RATE else {}
    return study.config.model_copy(
        update={
            "out": str(run_folder),
            "seed": seed,
            "stages": _stages(study.config.stages[0], steps, training == NEW_FIRST),
            "optimizer": study.config.optimizer.model_copy(update=rate),
        }
    )


def _stages(stage: Stage, steps: int, new_first: bool) -> tuple[Stage, ...]:
    """The stage over so many steps. With `new_first`, a stage before it trains the new layers alone, at its
    peak rate, for a part of the steps.
    """
    # Both stages together have the steps of the other variants, so that all read as many tokens.
    alone = round(_NEW_FIRST_FRACTION * steps) if new_first else 0
    stages = (stage.model_copy(update={"steps": steps - alone, "tokens": None}),)
    if not alone:
        return stages
    schedule = stage.schedule.model_copy(update={"kind": ScheduleKind.CONSTANT})
    before = {
        "name": "new-layers",
        "result": "new-layers",
        "steps": alone,
        "tokens": None,
        "train": Trained.NEW_LAYERS,
        "schedule": schedule,
    }
    return (stage.model_copy(update=before), *stages)


def _plan(study: Study, variant: str, seed: int) -> ExpansionPlan | None:
    """The expansion of a variant; None for the unexpanded model."""
    position, init, _ = _parts(variant)
    if position == UNEXPANDED:
        return None
    depth, count = study.model_config.num_hidden_layers, study.new_layers
    if position == "after":
        positions: dict[str, Any] = {"append": count}
    elif position == "auto":
        # Layers are chosen on the held-out text, by the loss with each of them applied twice.
        evaluation, seq_len = study.config.evaluation, study.config.data.seq_len
        packed = encode(
            study.tokenizer,
            study.texts,
            seq_len=seq_len,
            batch_size=evaluation.batch_size,
            max_bytes=evaluation.max_bytes,
        )
        packed = {language: text for language, text in packed.items() if text.bytes}
        result = sensitivity(study.model_config, study.params, packed, make_mesh(study.config.training.mesh))
        positions = {"insert_after": layers_to_double(result, count)}
    else:
        positions = {"new_layers": count}
    # Only noise is drawn: the plans of all other inits are the same for every seed.
    seeded = {"seed": seed} if INITS[init]["init"] is Init.NOISE else {}
    return plan_from_settings(ExpansionSettings(**{**positions, **INITS[init], **seeded}), depth)


def _relative_flops(study: Study) -> float:
    """The FLOPs of the deeper model for a token, as a multiple of the parent's."""
    plan = _plan(study, "among:copy", 0)
    assert plan is not None
    deeper, seq_len = expand_config(study.model_config, plan), study.config.data.seq_len
    return model_flops_per_token(deeper, seq_len) / model_flops_per_token(study.model_config, seq_len)


def _bits_per_byte(study: Study, config: ModelConfig, params: PyTree[Array]) -> dict[str, float]:
    """Bits per byte of a model on the held-out text, by language."""
    settings = study.config
    scorer = functools.partial(
        score,
        config,
        params,
        mesh=make_mesh(settings.training.mesh),
        batch_tokens=settings.evaluation.batch_size * settings.data.seq_len,
        compute_dtype=jnp.dtype(settings.training.compute_dtype),
        what="bits per byte",
    )
    items = scored_bits(study.heldout, scorer)
    return {language: of_language.score for language, of_language in items.items()}
