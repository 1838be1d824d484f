"""`babel evaluate`: the scores of a model by task and language, beside those of others.

What it writes into its folder:

responses/      what each model answered, by request; an evaluation that was stopped goes on from there
evaluation.json all scores, means and differences
scores.csv      the same, a row for each score
tables.md       the tables
TASK.png        bars by language
means.png       bars by class of languages
"""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from babel_jax.data.sources.embedded import read_texts
from babel_jax.data.tokens.fertility import fertility
from babel_jax.data.tokens.prompts import PromptTokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.distributed.agreement import agreed
from babel_jax.errors import BadInput
from babel_jax.evaluation.benchmarks.contamination import contamination
from babel_jax.evaluation.benchmarks.data import BITS_PER_BYTE, chosen_tasks, lacks, languages_of
from babel_jax.evaluation.benchmarks.responses import Responses
from babel_jax.evaluation.benchmarks.tables import TITLES, as_csv, plot_means, plot_task, report_text
from babel_jax.evaluation.bits_per_byte import scored_bits, text_to_score
from babel_jax.evaluation.items import Items, accuracy, chrf_plus_plus, differences, means_of, scores_of
from babel_jax.evaluation.scoring import score
from babel_jax.files import make_folder, write_text
from babel_jax.lease import alone_in
from babel_jax.model_folders.folder import ModelFolder, load_params, open_folder
from babel_jax.model_folders.streaming import files_now, fingerprint
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.sending import settle
from babel_jax.training.mesh import mesh_for, param_shardings

if TYPE_CHECKING:
    from lm_eval.api.task import Task

log = logging.getLogger("babel")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure. `data` is a folder of text (xx.jsonl) and benchmarks (see `benchmark_data`), None for
    the package's text and the hub; `few_shot` None takes each benchmark's own number of examples, `limit` the
    first items of each task. `trained_in` is a run folder, in whose windows the items are looked for."""

    tasks: tuple[str, ...] = (BITS_PER_BYTE,)
    languages: tuple[str, ...] | None = None
    data: Path | None = None
    few_shot: int | None = None
    limit: int | None = None
    max_bytes: int = 200_000
    chat: bool = False
    trained_in: Path | None = None


def evaluate(
    model: str, baselines: Sequence[str], request: Request, out: Path | None = None
) -> dict[str, Any]:
    """Measures `model` and `baselines` and compares them; writes into the folder `out`, where one is given.

    Returns {"tasks": {task: {language: {score, stderr, n}}}, "means": {all, high, low}, "fertility",
    "missing", "baselines", "summary"}. Raises BadInput for unknown tasks and languages, data that is missing
    or wrong, and models that cannot be evaluated.
    """
    models = list(dict.fromkeys([model, *baselines]))
    folders = {name: _checked(name, request.chat) for name in models}
    tasks, missing = _tasks(request)
    texts = read_texts(request.data, request.languages) if BITS_PER_BYTE in request.tasks else {}
    first = jax.process_index() == 0
    if out is not None:
        with agreed():
            if first:
                make_folder(out / "responses")
    with alone_in(out) if out is not None and first else contextlib.nullcontext():
        measured, details = {}, {}
        for name, folder in folders.items():
            if len(folders) > 1:
                log.info("evaluating %s", name)
            measured[name], details[name] = _measured(folder, tasks, texts, request, out)
        found = (
            {}
            if request.trained_in is None
            else {"contamination": contamination(request.trained_in, _items(tasks, request.limit))}
        )
        result = _result(model, measured, {**details, model: {**details[model], **found}}, missing)
        result |= {} if out is None else {"out": str(out)}
        if out is not None:
            with agreed():
                if first:
                    _write(out, result)
                    settle(out)
    return result


def batch_tokens_on(devices: int) -> int:
    """Tokens that so many accelerators score together."""
    return 16384 * devices


def _checked(name: str, chat: bool) -> ModelFolder:
    """The folder of a model that can be evaluated."""
    folder = open_folder(name)
    check_vocabulary(folder.path, folder.config.vocab_size, needed=True)
    if chat:
        PromptTokenizer(folder.path).chat(
            [{"role": "user", "content": "?"}]
        )  # raises where there is no template
    return folder


@dataclasses.dataclass(frozen=True)
class _Part:
    """One task of the harness: the benchmark and the language whose score it is a part of."""

    benchmark: str
    language: str
    task: "Task"


def _tasks(request: Request) -> tuple[dict[str, _Part], dict[str, list[str]]]:
    """The harness's tasks by name, with their items; and for each benchmark the languages without data."""
    chosen = [task for task in chosen_tasks(request.tasks) if task != BITS_PER_BYTE]
    if not chosen:
        return {}, {}
    try:
        from babel_jax.evaluation.benchmarks.tasks import load_tasks
    except ImportError as error:
        raise BadInput(
            f"the benchmarks need lm-eval and sacrebleu ({error}); pip install 'babel-jax[eval]'"
        ) from None
    found = {task: languages_of(task, request.languages, request.data) for task in chosen}
    empty = [task for task, (codes, _) in found.items() if not codes]
    if len(empty) == len(chosen) or any(task in request.tasks for task in empty):
        raise BadInput(lacks(empty[0], found[empty[0]][1], request.data))
    parts: dict[str, _Part] = {}
    for benchmark, (codes, _) in found.items():
        for code in codes:
            loaded = load_tasks(benchmark, code, request.data, request.few_shot)
            parts |= {name: _Part(benchmark, code, task) for name, task in loaded.items()}
    return parts, {task: without for task, (codes, without) in found.items() if without}


def _items(parts: dict[str, _Part], limit: int | None) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rows by task and language; both directions of a translation have the same ones."""
    items: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for part in parts.values():
        items.setdefault(part.benchmark, {})[part.language] = list(part.task.eval_docs)[:limit]
    return items


def _measured(
    folder: ModelFolder,
    parts: dict[str, _Part],
    texts: dict[str, list[str]],
    request: Request,
    out: Path | None,
) -> tuple[dict[str, dict[str, list[Items]]], dict[str, Any]]:
    """Items by task and language of one model, and what else is to be said of it."""
    mesh, dtype = mesh_for(folder.config), jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    batch_tokens = 2048 if jax.default_backend() == "cpu" else batch_tokens_on(jax.device_count())
    params = load_params(folder, dtype=dtype, shardings=param_shardings(folder.config, mesh))
    measured: dict[str, dict[str, list[Items]]] = {}
    details: dict[str, Any] = {}
    if parts:
        mark = fingerprint(files=files_now(folder.path), dtype=str(dtype))
        responses = Responses(
            mark, None if out is None else out / "responses" / f"{folder.path.name}-{mark[:8]}.jsonl"
        )
        measured, details["truncated"] = _benchmarks(
            folder, params, mesh, dtype, batch_tokens, parts, request, responses
        )
    if texts:
        tokenizer = open_tokenizer(folder.path)
        scored = functools.partial(
            score,
            folder.config,
            params,
            mesh=mesh,
            batch_tokens=batch_tokens,
            compute_dtype=dtype,
            what="bits per byte",
        )
        found = scored_bits(
            text_to_score(tokenizer, texts, folder.config.max_position_embeddings, request.max_bytes), scored
        )
        empty = [code for code in texts if code not in found]
        if empty:
            where = request.data or "the embedded corpus"
            raise BadInput(
                f"{where}: no text of two tokens or more in {', '.join(empty)}; name other --languages"
            )
        measured[BITS_PER_BYTE] = {code: [items] for code, items in found.items()}
        details["fertility"] = {
            code: own.tokens_per_byte for code, own in fertility(tokenizer, texts).items()
        }
    return measured, details


def _benchmarks(
    folder: ModelFolder,
    params: PyTree[Array],
    mesh: Mesh,
    dtype: Any,
    batch_tokens: int,
    parts: dict[str, _Part],
    request: Request,
    responses: Responses,
) -> tuple[dict[str, dict[str, list[Items]]], int]:
    from lm_eval.evaluator import evaluate as run_harness

    from babel_jax.evaluation.benchmarks.harness import DecoderLM

    model = DecoderLM(
        folder.config, params, PromptTokenizer(folder.path), responses, mesh, batch_tokens, dtype
    )
    found = run_harness(
        model,
        {"tasks": {name: part.task for name, part in parts.items()}},
        limit=request.limit,
        bootstrap_iters=0,
        apply_chat_template=request.chat,
        fewshot_as_multiturn=request.chat,
    )
    measured: dict[str, dict[str, list[Items]]] = {}
    for name, part in parts.items():
        metric = (
            "chrf++"
            if part.benchmark == "flores200"
            else "exact_match"
            if part.benchmark == "mgsm"
            else "acc"
        )
        values = [
            sample[metric] for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        ]
        items = chrf_plus_plus(*zip(*values, strict=True)) if metric == "chrf++" else accuracy(values)
        measured.setdefault(part.benchmark, {}).setdefault(part.language, []).append(items)
    return measured, model.truncated


def _result(
    model: str,
    measured: dict[str, dict[str, dict[str, list[Items]]]],
    details: dict[str, dict[str, Any]],
    missing: dict[str, list[str]],
) -> dict[str, Any]:
    scores = {name: scores_of(tasks) for name, tasks in measured.items()}
    changes = {name: differences(measured[model], tasks) for name, tasks in measured.items() if name != model}
    label = _labels(list(scores))
    notes = [
        f"{label[name]}: {count} requests were longer than the model's positions; their beginnings were cut."
        for name, own in details.items()
        if (count := own.get("truncated"))
    ]
    notes += [
        f"{TITLES[task]}, {code}: {counts['overlapping']} of {counts['items']} items share 13 tokens in a "
        "row with the training windows "
        f"({counts['long_enough']} are long enough to)."
        for task, by_language in details[model].get("contamination", {}).items()
        for code, counts in by_language.items()
    ]
    fertilities = {name: own["fertility"] for name, own in details.items() if "fertility" in own}
    others = {
        name: {
            "tasks": scores[name],
            "means": _means(scores[name]),
            "differences": changes[name],
            **details[name],
        }
        for name in changes
    }
    return {
        "model": model,
        "tasks": scores[model],
        "means": _means(scores[model]),
        "task_means": {task: _means({task: by_language}) for task, by_language in scores[model].items()},
        **details[model],
        "missing": missing,
        **({"baselines": others} if others else {}),
        "summary": report_text(
            _renamed(scores, label), _renamed(changes, label), missing, notes, _renamed(fertilities, label)
        ),
    }


def _labels(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model: the last part of its path, where these differ."""
    last = [Path(model).name for model in models]
    return dict(zip(models, last if len(set(last)) == len(last) else models, strict=True))


def _renamed(by_model: dict[str, Any], label: dict[str, str]) -> dict[str, Any]:
    return {label[model]: value for model, value in by_model.items()}


def _means(scores: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float | None]:
    """Over the benchmarks; over bits per byte, which are of another kind, where they are all there is."""
    plain = {
        task: {code: found["score"] for code, found in by_language.items()}
        for task, by_language in scores.items()
    }
    return means_of({task: values for task, values in plain.items() if task != BITS_PER_BYTE} or plain)


def _write(out: Path, result: dict[str, Any]) -> None:
    by_model = {
        result["model"]: result["tasks"],
        **{name: own["tasks"] for name, own in result.get("baselines", {}).items()},
    }
    label = _labels(list(by_model))
    changes = _renamed({name: own["differences"] for name, own in result.get("baselines", {}).items()}, label)
    scores = _renamed(by_model, label)
    write_text(out / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    write_text(out / "scores.csv", as_csv(scores, changes))
    write_text(out / "tables.md", result["summary"] + "\n")
    for task in result["tasks"]:
        plot_task(out / f"{task}.png", task, scores)
    means = _renamed({model: _means(by_task) for model, by_task in by_model.items()}, label)
    plot_means(
        out / "means.png",
        means,
        "bits per byte" if list(result["tasks"]) == [BITS_PER_BYTE] else "mean score of the tasks, %",
    )
