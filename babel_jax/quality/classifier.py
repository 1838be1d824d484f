"""The classifier's folder: trained on judged documents, compared with held-out ones, and used to score text.

hf/              the decoder, a model folder (without an output projection)
quality.json     the head, the scale, the meaning of scores by language, and the agreement with the
judge; written last
agreement.md     the agreement as a table
scored/xx.jsonl  rows with their `score`; xx.json, written last, has their origin and the time taken
"""

import contextlib
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from babel_jax.config import Source
from babel_jax.config.quality import Calibration, QualityConfig
from babel_jax.data.sources.records import source_files
from babel_jax.data.sources.rows import Row, rows_of_all
from babel_jax.data.sources.streams import file_version
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.disk_errors import explain_os_errors
from babel_jax.draws import Purpose, unit_draw
from babel_jax.errors import BadInput
from babel_jax.files import make_folder, read_json, write_text
from babel_jax.languages import LANGUAGES, in_order
from babel_jax.lease import alone_in
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import load_params, save_folder
from babel_jax.model_folders.streaming import fingerprint
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.new_folders import new_folder
from babel_jax.places import PARTIAL, on_disk
from babel_jax.progress import Work
from babel_jax.quality.agreement import quantile_grid, quantile_of, roc_auc, spearman
from babel_jax.quality.judge import JUDGED, Judged, read_judged
from babel_jax.quality.regressor import HEAD, Regressor, with_head
from babel_jax.run_files import read_as
from babel_jax.training.mesh import mesh_for, param_shardings

CLASSIFIER, QUALITY, SCORED = "classifier", "quality.json", "scored"
ALL = "all"

log = logging.getLogger("babel")


def train_classifier(config: QualityConfig) -> dict[str, Any]:
    """Trains on OUT/judged.jsonl and writes OUT/classifier; a failure leaves no half-written folder.

    Returns {"out", "classifier", "documents", "languages": {code: {"trained", "heldout"}}, "losses":
    {"first", "last"}, "agreement": {code or "all": {"n", "spearman", "roc_auc", "error"}}, "summary"}. Raises
    BadInput if a language has no judged document to train on.
    """
    out, settings = on_disk(config.out, "out"), config.classifier
    make_folder(out)
    with alone_in(out), new_folder(out / CLASSIFIER) as partial:
        # The draw is by id: a document stays held out when more documents are judged.
        judged = read_judged(out / JUDGED, config.judge.dimensions)
        draws = [unit_draw(Purpose.CLASSIFIER_HELDOUT, document["id"]) for document in judged]
        is_heldout = np.array(draws) < settings.heldout_fraction
        heldout: list[Judged] = []
        trained: list[Judged] = []
        for document, held in zip(judged, is_heldout, strict=True):
            (heldout if held else trained).append(document)
        # Languages without a document to train on are refused before the model is loaded.
        counts = _counts(config, trained, heldout)
        log.info("%s", counts_table(counts))

        # The head replaces the output matrix, so the model counts as tied.
        folder = open_folder(settings.model)
        check_vocabulary(folder.path, folder.config.vocab_size)
        tied = folder.config.model_copy(update={"tie_word_embeddings": True})
        mesh = mesh_for(folder.config)
        loaded = load_params(folder, dtype=jnp.float32, shardings=param_shardings(folder.config, mesh))
        params = with_head(loaded, tied.hidden_size, len(config.judge.dimensions))
        regressor = Regressor(tied, params, open_tokenizer(folder.path), settings, mesh)
        texts = [document["text"] for document in trained]
        losses = regressor.train(texts, _targets(trained, config), config.seed)

        # The grids calibrate a language's scores; agreement is of held-out documents alone.
        raw = _raw_scores(regressor, [document["text"] for document in judged])
        grids = _grids([document["language"] for document in judged], raw)
        agreement = _agreement(heldout, raw[is_heldout], config)
        # The model is a usual model folder; the head and the calibration are beside it.
        hf_config = write_hf_config(tied, folder.hf_config, "float32")
        save_folder(partial / "hf", Format.HF, {"model": regressor.params["model"]}, hf_config, folder.path)
        head = {name: np.asarray(value).tolist() for name, value in regressor.params[HEAD].items()}
        quality = {
            "dimensions": list(config.judge.dimensions),
            "scale": [config.judge.lowest, config.judge.highest],
            HEAD: head,
            "grids": grids,
            "agreement": agreement,
        }
        table = agreement_table(agreement, settings.good)
        write_text(partial / "agreement.md", table + "\n")
        write_text(partial / QUALITY, json.dumps(quality) + "\n")
    return {
        "out": str(out),
        "classifier": str(out / CLASSIFIER),
        "documents": len(trained),
        "languages": counts,
        "losses": {"first": losses[0], "last": float(np.mean(losses[-10:]))},
        "agreement": agreement,
        "summary": f"{table}\n\n{counts_table(counts)}",
    }


def score_sources(config: QualityConfig, languages: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes OUT/scored/xx.jsonl for each language of the sources: rows {"id", "text", "kind", "score",
    "raw_score"}, in order.

    The raw score is the mean of the dimensions, as a fraction of the judge's scale; `score` is computed from
    it by `classifier.calibration`. A language that was scored with the same classifier and text is kept. Rows
    below the threshold are left out. Returns {"out", "languages": {code: {"documents", "kept", "tokens",
    "seconds", "mean_raw_score"}}, "tokens_per_second", "summary"}. Raises BadInput if there is no classifier,
    and for languages without a source.
    """
    out = on_disk(config.out, "out")
    of_sources = dict.fromkeys(source.language for source in config.sources)
    if missing := [code for code in languages or () if code not in of_sources]:
        raise BadInput(
            f"--languages: no source is of {', '.join(missing)}; there are sources of {' '.join(of_sources)}"
        )
    regressor, quality = open_classifier(config)
    make_folder(out / SCORED)
    counted: dict[str, dict[str, float]] = {}
    with alone_in(out):
        for code in in_order(of_sources if languages is None else languages):
            sources = [source for source in config.sources if source.language == code]

            # A language is scored again only if the classifier, its settings or the text have changed.
            known = out / SCORED / f"{code}.json"
            mark = fingerprint(
                quality=quality,
                settings=config.classifier.model_dump(mode="json"),
                characters=config.judge.max_characters,
                text=_text(sources),
            )
            before = _scored_before(known)
            if before.get("made") == mark:
                counted[code] = {name: value for name, value in before.items() if name != "made"}
                continue
            # The result is written first, then its mark: a stop between the two scores the language again.
            rows = rows_of_all(sources, config.bad_rows)
            counted[code] = _score_language(
                rows, out / SCORED / f"{code}.jsonl", code, regressor, quality["grids"], config
            )
            write_text(known, json.dumps({"made": mark, **counted[code]}) + "\n")

    tokens = sum(entry["tokens"] for entry in counted.values())
    seconds = sum(entry["seconds"] for entry in counted.values())
    rate = tokens / seconds if seconds else None
    lines = []
    for code, entry in counted.items():
        lines.append(
            f"{code}: {entry['kept']:,} of {entry['documents']:,} documents kept, mean raw score "
            f"{entry['mean_raw_score']:.3f}"
        )
    lines += [f"{rate:,.0f} tokens/s"] if rate else []
    return {
        "out": str(out / SCORED),
        "languages": counted,
        "tokens_per_second": rate,
        "summary": "\n".join([*lines, str(out / SCORED)]),
    }


def _scored_before(path: Path) -> dict[str, Any]:
    """The record of a scored language; empty if there is none or it is damaged: the language is then scored
    again.
    """
    try:
        result: dict[str, Any] = read_as(path, dict[str, Any])
        return result
    except (FileNotFoundError, BadInput):
        return {}


def open_classifier(config: QualityConfig) -> tuple[Regressor, dict[str, Any]]:
    """The trained classifier and its quality.json.

    Raises BadInput if there is none, or it is damaged.
    """
    path = on_disk(config.out, "out") / CLASSIFIER
    try:
        quality = read_json(path / QUALITY, path)
        head = {name: jnp.asarray(quality[HEAD][name], jnp.float32) for name in ("weight", "bias")}
    except FileNotFoundError:
        raise BadInput(f"{path}: no classifier; run `babel classifier` first") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise BadInput(
            f"{path / QUALITY}: damaged ({error}); remove the folder {path} and run `babel classifier` again"
        ) from None
    folder = open_folder(path / "hf")
    shardings = param_shardings(folder.config, mesh_for(folder.config))
    params = {"model": load_params(folder, dtype=jnp.float32, shardings=shardings)["model"], HEAD: head}
    return Regressor(folder.config, params, open_tokenizer(folder.path), config.classifier), quality


def calibrated(
    raw: Float[np.ndarray, "n"], language: str, grids: dict[str, list[float]], by: Calibration
) -> Float[np.ndarray, "n"]:
    """Raw scores as the values that are compared with a threshold. A language without judged documents uses
    the grid of all languages.
    """
    if by is Calibration.NONE:
        result: Float[np.ndarray, "n"] = np.clip(raw, 0.0, 1.0)
        return result
    return quantile_of(raw, grids[language if by is Calibration.LANGUAGE and language in grids else ALL])


def agreement_table(agreement: dict[str, dict[str, Any]], good: float) -> str:
    """Markdown: a row for each language with held-out documents, and for all together."""
    lines = [
        f"# Agreement with the judge on held-out documents (a mean score of {good:g} or more counts as good)",
        "",
        "| language | documents | good % | Spearman | area under ROC | mean squared error |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for code, entry in agreement.items():
        name = f"{LANGUAGES[code].name} ({code})" if code in LANGUAGES else "**all**"
        values = []
        for key in ("spearman", "roc_auc", "error"):
            values.append("" if entry[key] is None else f"{entry[key]:.3f}")
        lines.append(f"| {name} | {entry['n']} | {100 * entry['good']:.0f} | {' | '.join(values)} |")
    return "\n".join(lines)


def counts_table(counts: dict[str, dict[str, int]]) -> str:
    """A line for each language: the number of judged documents to train on, and of held-out ones."""
    lines = []
    for code, count in counts.items():
        lines.append(f"{code}: {count['trained']:,} documents to train on, {count['heldout']:,} held out")
    return "\n".join(lines)


def _counts(
    config: QualityConfig, trained: Sequence[Judged], heldout: Sequence[Judged]
) -> dict[str, dict[str, int]]:
    """{code: {"trained", "heldout"}} for the languages of the sources and of the judged documents.

    Raises BadInput for a language without a document to train on, because its scores would be learned from
    other languages.
    """
    # Languages of sources count too: they are to be scored later.
    of_trained = Counter(document["language"] for document in trained)
    of_heldout = Counter(document["language"] for document in heldout)
    languages = {source.language for source in config.sources} | of_trained.keys() | of_heldout.keys()
    counts, missing = {}, []
    for code in in_order(languages):
        counts[code] = {"trained": of_trained[code], "heldout": of_heldout[code]}
        if not of_trained[code]:
            all_heldout = ", all held out" if of_heldout[code] else ""
            missing.append(f"{code} ({of_heldout[code]} judged{all_heldout})")
    if missing:
        raise BadInput(
            f"{on_disk(config.out, 'out') / JUDGED}: no document to train on in {', '.join(missing)}; judge "
            "more, lower classifier.heldout_fraction, or leave out the sources of these languages"
        )
    return counts


def _text(sources: Sequence[Source]) -> list[Any]:
    """The sources with the versions of their files, which identify the text."""
    described = []
    for source in sources:
        paths = source_files(source) if source.path else []
        described.append([source.model_dump(mode="json"), [(path, file_version(path)) for path in paths]])
    return described


def _score_language(
    rows: Iterator[Row],
    path: Path,
    code: str,
    regressor: Regressor,
    grids: dict[str, list[float]],
    config: QualityConfig,
) -> dict[str, float]:
    """Writes the scored rows into a partial file, then renames it. Returns the counts of the language."""
    partial = path.with_name(path.name + PARTIAL)
    total = {"documents": 0, "kept": 0, "tokens": 0, "seconds": 0.0, "mean_raw_score": 0.0}
    threshold = config.classifier.thresholds.get(code, config.classifier.threshold)
    waiting: list[Row] = []

    def texts() -> Iterator[str]:
        for row in rows:
            waiting.append(row)
            # The judge read this part of a text, so the classifier was trained on such parts. All of it is
            # written.
            yield row.text[: config.judge.max_characters]

    with contextlib.ExitStack() as stack:
        stack.enter_context(explain_os_errors(path))
        file = stack.enter_context(open(partial, "w", encoding="utf-8"))
        progress = stack.enter_context(Work[Any](f"scoring {code}", unit="documents"))
        # Scores come in blocks, in the order of the rows that wait for them.
        for scores, speed in regressor.score(texts()):
            raw = scores.mean(axis=1)
            parts = calibrated(raw, code, grids, config.classifier.calibration)
            block, waiting[:] = waiting[: len(raw)], waiting[len(raw) :]
            for row, score, raw_score in zip(block, parts, raw, strict=True):
                if score < threshold:
                    continue
                total["kept"] += 1
                values = {
                    **dataclasses.asdict(row),
                    "score": round(float(score), 4),
                    "raw_score": round(float(raw_score), 4),
                }
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
            total["documents"] += speed.documents
            total["tokens"] += speed.tokens
            total["seconds"] += speed.seconds
            total["mean_raw_score"] += float(raw.sum())
            progress.update(len(raw))
            progress.note(f"{speed.tokens_per_second:,.0f} tokens/s")
    total["mean_raw_score"] /= max(1, total["documents"])
    partial.replace(path)
    return total


def _targets(documents: Sequence[Judged], config: QualityConfig) -> Float[np.ndarray, "documents dimensions"]:
    """The judge's scores as fractions of the scale."""
    low, high = config.judge.lowest, config.judge.highest
    scores = []
    for document in documents:
        scores.append([document["scores"][name] for name in config.judge.dimensions])
    return (np.array(scores, np.float32).reshape(len(documents), -1) - low) / (high - low)


def _raw_scores(regressor: Regressor, texts: Sequence[str]) -> Float[np.ndarray, "documents"]:
    return np.concatenate([scores.mean(axis=1) for scores, _ in regressor.score(texts)])


def _grids(languages: Sequence[str], raw: Float[np.ndarray, "documents"]) -> dict[str, list[float]]:
    """The quantiles of the raw scores, by language and for all together."""
    # One grid for each language, because raw scores of two languages do not mean the same.
    codes = np.array(languages)
    grids = {code: quantile_grid(raw[codes == code]) for code in dict.fromkeys(languages)}
    return grids | {ALL: quantile_grid(raw)}


def _agreement(
    heldout: Sequence[Judged], raw: Float[np.ndarray, "documents"], config: QualityConfig
) -> dict[str, dict[str, Any]]:
    """The agreement of raw scores with the judge on held-out documents, by language and for all together."""
    languages = np.array([document["language"] for document in heldout])
    judged = _targets(heldout, config).mean(axis=1) if heldout else np.zeros(0)
    good = np.array([document["score"] for document in heldout]) >= config.classifier.good
    chosen = {code: languages == code for code in in_order(languages.tolist())} | {
        ALL: np.ones(len(heldout), bool)
    }
    agreement = {}
    for code, members in chosen.items():
        if members.any():
            values = {
                "spearman": spearman(raw[members], judged[members]),
                "roc_auc": roc_auc(raw[members], good[members]),
                "error": float(np.mean((raw[members] - judged[members]) ** 2)),
            }
            # JSON has no NaN.
            known = {name: value if np.isfinite(value) else None for name, value in values.items()}
            agreement[code] = {"n": int(members.sum()), "good": float(good[members].mean()), **known}
    return agreement
