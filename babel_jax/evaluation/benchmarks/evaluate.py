"""`babel evaluate`: the scores of a model by task and language, beside those of other models.

Files in its folder:

    responses/       the answers of each model by request; a stopped evaluation resumes from them
    evaluation.json  all scores, means and differences
    scores.csv       the same, a row for each score
    tables.md        the tables
    evaluation.html  the same as a page
    TASK.png         bars by language
    means.png        bars by class of languages
"""

import contextlib
import dataclasses
import functools
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
from babel_jax.evaluation.benchmarks.data import HARNESS, chosen_tasks, lacks, languages_of
from babel_jax.evaluation.benchmarks.responses import Responses
from babel_jax.evaluation.benchmarks.result import result_of, write_result
from babel_jax.evaluation.bits_per_byte import scored_bits, text_to_score
from babel_jax.evaluation.items import BITS_PER_BYTE, Items, accuracy, chrf_plus_plus
from babel_jax.evaluation.scoring import score
from babel_jax.files import make_folder
from babel_jax.lease import alone_in
from babel_jax.model_folders.folder import ModelFolder, open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.streaming import files_now, fingerprint
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.sending import settle
from babel_jax.training.mesh import mesh_for, param_shardings

if TYPE_CHECKING:
    from lm_eval.api.task import Task

log = logging.getLogger("babel")


@dataclasses.dataclass(frozen=True)
class Request:
    """The tasks, the data and the limits of an evaluation.

    - data: a folder of text (xx.jsonl) and benchmarks (see `benchmarks.data`); None for the package's text
      and the hub
    - few_shot: examples in a prompt; None for each benchmark's default
    - limit: only the first items of each task
    - max_bytes: bytes of text of each language, for bits per byte
    - trained_in: a run folder, in whose windows the items are searched for
    """

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
    """Evaluates `model` and `baselines` and compares them; writes the files into the folder `out`, if one is
    given.

    Returns {"model", "tasks": {task: {language: {score, stderr, n}}}, "task_means", "means": {all, high,
    low}, "fertility", "missing", "summary"}; with baselines also "baselines", with `out` also "out", and
    "contamination" and "truncated" where there is something to tell. Raises BadInput for unknown tasks and
    languages, missing or wrong data, and models that cannot be evaluated.
    """
    # All input is checked before the first model is loaded.
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
        # One model after the other: two models may not fit into memory together.
        items, details = {}, {}
        for name, folder in folders.items():
            if len(folders) > 1:
                log.info("evaluating %s", name)
            items[name], details[name] = _scored_items(folder, tasks, texts, request, out)
        if request.trained_in is not None:
            rows = _rows_of_tasks(tasks, request.limit)
            details[model]["contamination"] = contamination(request.trained_in, rows)

        result = result_of(model, items, details, missing)
        if out is not None:
            result["out"] = str(out)
            with agreed():
                if first:
                    write_result(out, result)
                    settle(out)
    return result


def batch_tokens_on(devices: int) -> int:
    """The number of tokens that so many accelerators score together."""
    return 16384 * devices


def _checked(name: str, chat: bool) -> ModelFolder:
    """The folder of a model. Raises BadInput if it cannot be evaluated."""
    folder = open_folder(name)
    check_vocabulary(folder.path, folder.config.vocab_size, needed=True)
    if chat:
        # Raises where there is no template.
        PromptTokenizer(folder.path).chat([{"role": "user", "content": "?"}])
    return folder


@dataclasses.dataclass(frozen=True)
class _Part:
    """One task of the harness, with the benchmark and the language that its score counts for.

    is_named: a task that the user named, and no benchmark of ours.
    """

    benchmark: str
    language: str
    task: "Task"
    is_named: bool = False


def _tasks(request: Request) -> tuple[dict[str, _Part], dict[str, list[str]]]:
    """The harness's tasks by name, with their items; and for each benchmark the languages without data."""
    chosen = [task for task in chosen_tasks(request.tasks) if task != BITS_PER_BYTE]
    if not chosen:
        return {}, {}
    try:
        from babel_jax.evaluation.benchmarks.named_tasks import load_named
        from babel_jax.evaluation.benchmarks.tasks import examples_in, load_tasks
    except ImportError as error:
        raise BadInput(
            f"the benchmarks need lm-eval and sacrebleu ({error}); pip install 'babel-jax[eval]'"
        ) from None

    # Tasks that the user names as the harness does.
    named = [task for task in chosen if task.startswith(HARNESS)]
    parts: dict[str, _Part] = {}
    for asked in named:
        for of_language in load_named(asked, request.languages, request.few_shot):
            for name, task in of_language.tasks.items():
                if name in parts:
                    raise BadInput(f"{asked}: {name} is asked for twice; name it once")
                parts[name] = _Part(asked, of_language.language, task, is_named=True)
    chosen = [task for task in chosen if task not in named]

    # A benchmark without data is an error only if no other has any.
    present, missing = {}, {}
    for benchmark in chosen:
        present[benchmark], missing[benchmark] = languages_of(
            benchmark, request.languages, request.data, examples_in(benchmark, request.few_shot)
        )
    empty = [benchmark for benchmark, codes in present.items() if not codes]
    if empty and len(empty) == len(chosen) and not parts and BITS_PER_BYTE not in request.tasks:
        raise BadInput(lacks(empty[0], missing[empty[0]], request.data))
    for benchmark in empty:
        if benchmark in request.tasks:
            log.warning("left out: %s", lacks(benchmark, missing[benchmark], request.data))

    # All rows are read and checked here, before a model is loaded.
    for benchmark, codes in present.items():
        for code in codes:
            for name, task in load_tasks(benchmark, code, request.data, request.few_shot).items():
                parts[name] = _Part(benchmark, code, task)
    return parts, {benchmark: codes for benchmark, codes in missing.items() if codes}


def _rows_of_tasks(parts: dict[str, _Part], limit: int | None) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rows by task and language; both directions of a translation have the same rows."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for part in parts.values():
        rows.setdefault(part.benchmark, {})[part.language] = list(part.task.eval_docs)[:limit]
    return rows


def _scored_items(
    folder: ModelFolder,
    parts: dict[str, _Part],
    texts: dict[str, list[str]],
    request: Request,
    out: Path | None,
) -> tuple[dict[str, dict[str, list[Items]]], dict[str, Any]]:
    """The scored items of one model by task and language, and further figures: truncated requests,
    fertility.
    """
    is_cpu = jax.default_backend() == "cpu"
    # CPUs compute bfloat16 through float32, so float32 costs nothing there.
    mesh, dtype = mesh_for(folder.config), jnp.float32 if is_cpu else jnp.bfloat16
    batch_tokens = 2048 if is_cpu else batch_tokens_on(jax.device_count())
    params = load_params(folder, dtype=dtype, shardings=param_shardings(folder.config, mesh))
    items: dict[str, dict[str, list[Items]]] = {}
    details: dict[str, Any] = {}

    if parts:
        # Answers are kept in a file of this model and type: a stopped evaluation resumes with them.
        mark = fingerprint(files=files_now(folder.path), dtype=str(dtype))
        path = None if out is None else out / "responses" / f"{folder.path.name}-{mark[:8]}.jsonl"
        items, details["truncated"] = _benchmarks(
            folder, params, mesh, dtype, batch_tokens, parts, request, Responses(mark, path)
        )

    if texts:
        tokenizer = open_tokenizer(folder.path)
        scorer = functools.partial(
            score,
            folder.config,
            params,
            mesh=mesh,
            batch_tokens=batch_tokens,
            compute_dtype=dtype,
            what="bits per byte",
        )
        positions = folder.config.max_position_embeddings
        bits = scored_bits(text_to_score(tokenizer, texts, positions, request.max_bytes), scorer)
        # A mean without a language could not be compared with other means.
        empty = [code for code in texts if code not in bits]
        if empty:
            source = request.data or "the embedded corpus"
            raise BadInput(
                f"{source}: no text of two tokens or more in {', '.join(empty)}; name other --languages"
            )
        items[BITS_PER_BYTE] = {code: [of_language] for code, of_language in bits.items()}
        fertilities = fertility(tokenizer, texts)
        details["fertility"] = {code: figures.tokens_per_byte for code, figures in fertilities.items()}
    return items, details


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
    from babel_jax.evaluation.benchmarks.named_tasks import items_of
    from babel_jax.evaluation.benchmarks.tasks import BENCHMARKS

    model = DecoderLM(
        folder.config, params, PromptTokenizer(folder.path), responses, mesh, batch_tokens, dtype
    )
    # The harness makes the prompts and the metrics; its own bootstrap is not paired.
    results = run_harness(
        model,
        {"tasks": {name: part.task for name, part in parts.items()}},
        limit=request.limit,
        bootstrap_iters=0,
        apply_chat_template=request.chat,
        fewshot_as_multiturn=request.chat,
    )
    items: dict[str, dict[str, list[Items]]] = {}
    named: dict[tuple[str, str], list[str]] = {}
    for name, part in parts.items():
        # The tasks that the user named count together, as one score of a language.
        if part.is_named:
            named.setdefault((part.benchmark, part.language), []).append(name)
            continue
        metric = BENCHMARKS[part.benchmark].metric
        # Items of two models are compared in pairs, so their order is fixed.
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        values = [sample[metric] for sample in samples]
        of_task = chrf_plus_plus(*zip(*values, strict=True)) if metric == "chrf++" else accuracy(values)
        items.setdefault(part.benchmark, {}).setdefault(part.language, []).append(of_task)
    for (asked, code), names in named.items():
        samples = [results["samples"][name] for name in names]
        pooled = items_of(asked, [parts[name].task for name in names], samples)
        items.setdefault(asked, {})[code] = [pooled]
    return items, model.truncated
