"""The rows of the benchmarks, from the user's folder or the Hugging Face hub, checked before any
computation.

A folder has BENCHMARK/LANGUAGE.SPLIT.jsonl (mmmlu/sw.test.jsonl) with the keys of the data sets on the hub.
Flores-200 has the layout of its archive: flores200/devtest/swh_Latn.devtest, a sentence a line. Instead of
these files there may be a data set that TFDS has prepared, BENCHMARK/LANGUAGE/VERSION (xcopa/sw/1.0.0), whose
features have the same keys; the folder is then its data_dir.
"""

import contextlib
import difflib
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from babel_jax.errors import BadInput, one_line
from babel_jax.evaluation.benchmarks.broad_datasets import BROAD_DATASETS
from babel_jax.evaluation.benchmarks.dataset import Item
from babel_jax.evaluation.benchmarks.datasets import DATASETS, REPORTED
from babel_jax.evaluation.benchmarks.flores_archive import FOLDERS, flores_folder
from babel_jax.evaluation.items import BITS_PER_BYTE
from babel_jax.json_text import parse_json
from babel_jax.languages import BABEL, LANGUAGES, in_order, language

log = logging.getLogger("babel")

# Bits per byte are of plain text: a task without questions.
TASKS = (*DATASETS, BITS_PER_BYTE)
HARNESS = "lm-eval:"  # before the name of any task of the harness
_GROUPS = {"all": REPORTED, "broad": tuple(BROAD_DATASETS)}
# The benchmarks whose prompts need words of each language.
_WITH_OWN_WORDS = ("xcopa", "mgsm", "xnli", "mmlu_prox")
# For English, MMLU takes the place of MMMLU.
_MMLU = ("cais/mmlu", "all")


def chosen_tasks(names: Sequence[str]) -> list[str]:
    """Task names, with `all` replaced by the report's six benchmarks and `broad` by the benchmarks in many
    languages.

    Raises BadInput for an unknown name, with similar names.
    """
    chosen: list[str] = []
    for name in names:
        if name not in _GROUPS and name not in TASKS and not name.startswith(HARNESS):
            near = difflib.get_close_matches(name.lower(), TASKS, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise BadInput(
                f"unknown task {name!r}: {hint}there are all broad {' '.join(TASKS)}, and {HARNESS}TASK for "
                "each task of lm-evaluation-harness"
            )
        chosen += _GROUPS.get(name, (name,))
    return list(dict.fromkeys(chosen))


def languages_of(
    benchmark: str, languages: Sequence[str] | None, folder: Path | None, examples: bool = True
) -> tuple[list[str], list[str]]:
    """(languages with data, languages without data) of a benchmark. The languages are `languages`, or without
    them Babel's 25 and all others in the folder.

    examples: False where prompts have no examples, so that their split is not needed. Most benchmarks have
    prompts for every language, so a folder may have translations. Raises BadInput for an unknown language.
    """
    wanted = {language(code).code for code in languages} if languages else set(BABEL)
    # The hub's languages are known from the table. MMMLU has no English there, but MMLU is its original.
    if folder is None:
        available = {*DATASETS[benchmark].configs, *(["en"] if benchmark == "mmmlu" else [])}
    else:
        available = set()
        for code in _possible(benchmark):
            if _is_whole(benchmark, code, folder, examples) or _tfds_folder(benchmark, code, folder):
                available.add(code)
    # Languages beyond Babel's are evaluated if the folder has them.
    if folder is not None and not languages:
        wanted |= available
    # English is the other side of every pair of Flores-200.
    if benchmark == "flores200":
        wanted -= {"en"}
    return in_order(wanted & available), in_order(wanted - available)


def _possible(benchmark: str) -> Collection[str]:
    """The languages that the benchmark has prompts for."""
    return DATASETS[benchmark].configs if benchmark in _WITH_OWN_WORDS else LANGUAGES


def lacks(benchmark: str, codes: Sequence[str], folder: Path | None) -> str:
    """The message for a benchmark without data for any of the languages `codes`."""
    has = in_order(DATASETS[benchmark].configs)
    known = " ".join(has) if len(has) <= len(BABEL) else f"{len(has)} languages, not these"
    possible = [code for code in codes if code in _possible(benchmark)]
    if folder is None or not possible:
        return f"{benchmark}: no data for {' '.join(codes) or 'en'}; {DATASETS[benchmark].hub} has {known}"
    files = ", ".join(str(file) for file in files_of(benchmark, possible[0], folder))
    return (
        f"{benchmark}: no data for {' '.join(possible)} in {folder}; for {possible[0]} it needs {files} "
        f"(from {DATASETS[benchmark].hub})"
    )


def files_of(benchmark: str, language: str, folder: Path, examples: bool = True) -> list[Path]:
    """The files of one language; those of the evaluated split come first. With `examples`, the others
    follow.
    """
    splits = _splits(benchmark, examples)
    if benchmark == "flores200":
        # The archive's own folder serves as it is.
        inside = next((folder / name for name in FOLDERS if (folder / name).is_dir()), folder / benchmark)
        files = []
        for split in splits:
            for code in (language, "en"):
                files.append(inside / split / f"{LANGUAGES[code].flores}.{split}")
        return files
    return [folder / benchmark / f"{language}.{split}.jsonl" for split in splits]


def _splits(benchmark: str, examples: bool) -> tuple[str, ...]:
    splits = DATASETS[benchmark].splits
    return splits if examples else splits[:1]


def _is_whole(benchmark: str, language: str, folder: Path, examples: bool = True) -> bool:
    return all(file.is_file() for file in files_of(benchmark, language, folder, examples))


def _tfds_folder(benchmark: str, language: str, folder: Path) -> Path | None:
    """The newest version of the data set that TFDS has prepared for a language; None if there is none."""
    versions = [file.parent for file in (folder / benchmark / language).glob("*/dataset_info.json")]

    # 10.0.0 is above 9.0.0.
    def version_of(path: Path) -> list[str]:
        return [part.zfill(9) for part in path.name.split(".")]

    return max(versions, key=version_of, default=None)


def read_rows(
    benchmark: str, language: str, folder: Path | None, examples: bool = True
) -> dict[str, list[Item]]:
    """The rows of each split; without `examples`, of the evaluated one. For Flores-200, pairs of sentences:
    `source` in the language, `target` in
    English.

    Raises BadInput for a missing file (with its path), an unreadable file, and a row that does not fit the
    benchmark. Users cannot correct rows of the hub, so its rows without an answer, or with an empty choice,
    are left out and counted.
    """
    source = DATASETS[benchmark]
    if folder is not None:
        rows_of = _from_folder(benchmark, language, folder, examples)
    else:
        rows_of = _from_hub(benchmark, language, examples)
    for split, rows in rows_of.items():
        problems: list[str] = []
        kept: list[Item] = []
        name = _named(benchmark, language, split, folder, examples)
        for number, row in enumerate(map(source.normal, rows), 1):
            location = f"{name}:{number}"
            # The keys show that the file is of this benchmark; then its values are checked.
            missing = [key for key in source.keys if key not in row]
            if missing:
                raise BadInput(
                    f"{location}: no {', '.join(missing)}; a row of {benchmark} has {', '.join(source.keys)}"
                )
            no_text = [key for key in source.texts if not isinstance(row[key], str)]
            problem = f"{no_text[0]} is no text" if no_text else source.check(row)
            if problem and folder is not None:
                raise BadInput(f"{location}: {problem}; correct or remove the row")
            if problem:
                problems.append(f"{location}: {problem}")
            else:
                kept.append({key: row[key] for key in source.keys})
        if problems:
            log.warning("%s; left out, of %d rows %d like it", problems[0], len(rows), len(problems))
        if not kept:
            raise BadInput(f"{benchmark}, {language}: the split {split} has no rows")
        rows_of[split] = kept
    return rows_of


def _named(benchmark: str, language: str, split: str, folder: Path | None, examples: bool) -> str:
    if folder is None:
        return f"{DATASETS[benchmark].hub} {language} {split}"
    if not _is_whole(benchmark, language, folder, examples):
        return f"{_tfds_folder(benchmark, language, folder)} {split}"
    return str(next(file for file in files_of(benchmark, language, folder) if split in file.name))


def _from_folder(benchmark: str, language: str, folder: Path, examples: bool) -> dict[str, list[Item]]:
    is_whole, splits = _is_whole(benchmark, language, folder, examples), _splits(benchmark, examples)
    prepared = None if is_whole else _tfds_folder(benchmark, language, folder)
    if prepared is not None:
        return {split: _tfds_rows(prepared, split) for split in splits}
    files = files_of(benchmark, language, folder, examples)
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise BadInput(
            f"{benchmark}, {language}: no {' and no '.join(missing)}; put it there, or leave --data out to "
            "take the hub's"
        )
    if benchmark == "flores200":
        # For each split, the file of the language and the English one.
        texts = [_lines(file) for file in files]
        # Line n of both files is the same sentence.
        rows = {}
        for split, sources, english in zip(splits, texts[::2], texts[1::2], strict=True):
            if len(sources) != len(english):
                raise BadInput(
                    f"flores200, {language}: {split} has {len(sources)} sentences and {len(english)} English "
                    "ones; take one release"
                )
            rows[split] = _pairs(sources, english)
        return rows
    return {split: _json_lines(file) for split, file in zip(splits, files, strict=True)}


def _tfds_rows(folder: Path, split: str) -> list[Item]:
    # Slow to import, and few folders need it.
    import tensorflow_datasets

    try:
        items = []
        for row in tensorflow_datasets.builder_from_directory(folder).as_data_source(split=split):
            items.append({key: _plain(value) for key, value in row.items()})
        return items
    except Exception as error:  # TFDS raises errors of many unrelated types
        raise BadInput(
            f"{folder}: its split {split} cannot be read: {one_line(error, 200)}; it must be "
            "in the format array_record"
        ) from error


def _plain(value: Any) -> Any:
    """A value in the types of JSON."""
    if isinstance(value, np.ndarray | list):
        return [_plain(element) for element in value]
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def _pairs(sources: Sequence[str], english: Sequence[str]) -> list[Item]:
    pairs = []
    for source, target in zip(sources, english, strict=True):
        pairs.append({"source": source, "target": target})
    return pairs


def _lines(file: Path) -> list[str]:
    """The lines of a text file, without a byte order mark at its start and blank lines at its end."""
    try:
        # utf-8-sig drops a byte order mark, which some editors of Windows write.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _json_lines(file: Path) -> list[Item]:
    rows = []
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{file}:{number}", unique_keys=False)
        if not isinstance(row, dict):
            raise BadInput(f"{file}:{number}: not a JSON object")
        rows.append(row)
    return rows


def _from_hub(benchmark: str, language: str, examples: bool) -> dict[str, list[Item]]:
    source = DATASETS[benchmark]
    if benchmark == "mmmlu" and language == "en":
        rows = _hub_rows(benchmark, language, *_MMLU, "test")
        return {"test": [_as_mmmlu(row) for row in rows]}
    if language not in source.configs:
        raise BadInput(lacks(benchmark, [language], None))
    if benchmark == "flores200" and "flores200" in LANGUAGES[language].sets:
        # The official archive has no gate.
        return _from_folder(benchmark, language, flores_folder(), examples)
    rows_of = {}
    for split in _splits(benchmark, examples):
        rows = _hub_rows(benchmark, language, source.hub, source.configs[language], split)
        if benchmark == "flores200":
            english = _hub_rows(benchmark, language, source.hub, LANGUAGES["en"].flores, split)
            rows = _pairs([row["text"] for row in rows], [row["text"] for row in english])
        rows_of[split] = rows
    return rows_of


def _as_mmmlu(row: Item) -> Item:
    letters = dict(zip("ABCD", row["choices"], strict=True))
    return {
        "Question": row["question"],
        **letters,
        "Answer": "ABCD"[row["answer"]],
        "Subject": row["subject"],
    }


def _hub_rows(benchmark: str, language: str, path: str, config: str, split: str) -> list[Item]:
    import datasets

    try:
        with _quiet():
            return list(datasets.load_dataset(path, config, split=split))
    except Exception as error:
        # The library raises errors of its own, of the network's and of the file system's.
        # The names of the files that the user can give in place of the hub's.
        files = ", ".join(str(file) for file in files_of(benchmark, language, Path("DIR")))
        raise BadInput(
            f"{path} ({config}) cannot be had from the hub: {one_line(error, 150)}; on a "
            f"machine without network, give --data DIR with {files}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Any:
    """Keeps the output of the library off standard output, where --json prints."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
