"""Cleans each part of each source into its shards. The last file of a task marks it as done.

`shards.py` describes the files. If `keep_dropped` is set, there is also

    dropped/xx/SSS-PPPPP.jsonl.zst  the documents that cleaning dropped, with the reason
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babel_jax.config import CleaningSettings, DataSettings, Rule, Source
from babel_jax.data.json_files import read_json
from babel_jax.data.refining.cleaning import Cleaner
from babel_jax.data.refining.decontamination import EvaluationText, evaluation_text
from babel_jax.data.refining.identification import identified_by
from babel_jax.data.refining.personal import masked_text
from babel_jax.data.refining.reasons import EVALUATION, EXAMPLE_CHARACTERS, EXAMPLES
from babel_jax.data.refining.shards import Shard, ShardWriter, json_lines, part_files
from babel_jax.data.sources.origins import changed_text, origin_of
from babel_jax.data.sources.records import parts
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.data.sources.streams import BadRowError
from babel_jax.disk_errors import explain_os_errors
from babel_jax.files import remove_folder, write_text
from babel_jax.places import PARTIAL

DUPLICATES = "duplicates.json"  # beside the parts of a language, after its duplicates have been removed


@dataclasses.dataclass(frozen=True)
class CleaningTask:
    """Cleans one part of a source: part `number` of source `source` of the language."""

    settings: DataSettings
    language: str
    source: int
    number: int
    part: str

    @property
    def stem(self) -> Path:
        """The path of the task's files, without a suffix."""
        return cleaned_folder(self.settings, self.language) / f"{self.source:03d}-{self.number:05d}"

    @property
    def done(self) -> Path:
        """The file that the task writes last."""
        return self.stem.with_suffix(".json")

    def made_from(self) -> dict[str, Any]:
        """The identity of the text: the source's settings, the part, and its origin.

        Reads the text of files.
        """
        source = sources_of(self.settings, self.language)[self.source]
        return {**source.model_dump(mode="json"), "part": self.part, **origin_of(source, self.part)}

    def is_of(self, before: dict[str, Any], recheck: bool) -> bool:
        """True if the text is still the text that was cleaned earlier. before: the `made_from` of that
        time.
        """
        source = sources_of(self.settings, self.language)[self.source]
        return before.get("part") == self.part and changed_text(before, source, self.part, recheck) is None


def cleaned_folder(settings: DataSettings, language: str) -> Path:
    """The folder of the shards of a language."""
    return Path(settings.folder) / "cleaned" / language


def sources_of(settings: DataSettings, language: str) -> list[Source]:
    """The sources of a language, in the order of the settings, each with a unique label.

    Weights, licences and counts are kept by label. If two sources read one file by `where`, their names get
    its conditions, such as "corpus (lang = sw)".
    """
    of_language = [source for source in settings.sources if source.language == language]
    # Only a label that several sources have needs more words.
    times = Counter(source.label for source in of_language)
    seen = Counter[str]()
    named = []
    for source in of_language:
        label = source.label
        if times[label] > 1:
            asked = ", ".join(f"{key} = {value}" for key, value in source.where.items())
            name = f"{label} ({asked})" if asked else label
            seen[name] += 1
            # Sources that also ask for the same get a number: "corpus (lang = sw) #2".
            is_unique = seen[name] == 1 and bool(asked)
            source = source.model_copy(update={"name": name if is_unique else f"{name} #{seen[name]}"})
        named.append(source)
    return named


def cleaning_tasks(settings: DataSettings, language: str) -> list[CleaningTask]:
    """A task for each part of each source of a language."""
    tasks = []
    for source_number, source in enumerate(sources_of(settings, language)):
        for part_number, part in enumerate(parts(source)):
            tasks.append(CleaningTask(settings, language, source_number, part_number, part))
    return tasks


def forget_other_text(
    settings: DataSettings, language: str, tasks: Sequence[CleaningTask], recheck: bool = False
) -> None:
    """Removes the parts whose text is no longer the same: a run that was stopped may resume with other text.

    If duplicates have been looked for already, all parts of the language are removed, because the compared
    documents have changed.
    """
    folder, links = cleaned_folder(settings, language), Path(settings.folder) / "links" / language
    wanted = {task.done: task for task in tasks}
    done = part_files(folder)
    # A part is other text if its task is gone, or if its file now has another content.
    other = []
    for path in done:
        task = wanted.get(path)
        if task is None or not task.is_of(read_json(path).get("made_from", {}), recheck):
            other.append(path)
    was_compared = links.exists() or (folder / DUPLICATES).is_file()
    if not other and (len(done) == len(tasks) or not was_compared):
        return
    with explain_os_errors(folder):
        if was_compared:
            remove_aside(Path(settings.folder), language)
            # One rename, so that a kill leaves all shards or none.
            folder.rename(_aside(Path(settings.folder), language))
            folder.mkdir()
            remove_folder(links)
            remove_aside(Path(settings.folder), language)
        else:
            # No documents have been compared yet, so each part may be removed alone. Its mark goes first.
            for path in other:
                path.unlink()
                for shard in folder.glob(f"{path.stem}-*"):
                    shard.unlink()


def _aside(prepared: Path, language: str) -> Path:
    return prepared / "cleaned" / f"{language}{PARTIAL}"


def remove_aside(prepared: Path, language: str) -> None:
    """Removes the shards of other text, including those that a killed process had begun to remove."""
    remove_folder(_aside(prepared, language))


@dataclasses.dataclass(frozen=True)
class _Judge:
    """Cleans the documents of a part and decides which ones are dropped. None: the settings do not ask for
    cleaning, or for a comparison with evaluation items.
    """

    language: str
    cleaner: Cleaner | None
    evaluation: EvaluationText | None

    def __call__(self, text: str) -> tuple[str, str | None, str | None]:
        """The clean text; the reason for which it is dropped, if any; and the evaluation file that has it.

        Raises BadRowError for text that cannot be cleaned.
        """
        document = rule = file = None
        if self.cleaner is not None:
            document, rule = self.cleaner.judged(text)
        # Evaluation items are not masked, so they are compared before personal data is.
        if self.evaluation is not None and rule is None:
            file = self.evaluation.file_of(text, self.language)
        reason = rule if file is None else EVALUATION
        if self.cleaner is not None and document is not None:
            text = self.cleaner.without_personal_data(document) if reason is None else document.text
        return text, reason, file


@dataclasses.dataclass
class _PartCounts:
    """The documents that were read; the characters of the kept ones; by reason, the dropped ones and a few of
    their texts; by evaluation file, the documents that share text with it.
    """

    documents: int = 0
    characters: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    evaluation: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, text: str, reason: str | None, file: str | None) -> None:
        """Counts a document that was judged."""
        self.documents += 1
        if file is not None:
            self.evaluation[file] += 1
        if reason is None:
            self.characters += len(text)
            return
        # Only the first documents of each reason are kept as examples.
        self.dropped[reason] += 1
        examples = self.examples.setdefault(str(reason), [])
        if len(examples) < EXAMPLES:
            # Twice as much is masked, so that the cut leaves no part of an address.
            examples.append(masked_text(text[: 2 * EXAMPLE_CHARACTERS])[:EXAMPLE_CHARACTERS])


def clean_part(task: CleaningTask) -> None:
    """Writes the shards of one part, its dropped documents, and last its counts."""
    settings = task.settings
    source = sources_of(settings, task.language)[task.source]
    # Before the text is read: if the file changes meanwhile, the next run sees that its text is another.
    made_from = task.made_from()
    cleaner = None if settings.cleaning is None else Cleaner(_rules(settings.cleaning, source), task.language)
    evaluation = None if settings.decontamination is None else evaluation_text(settings.decontamination)
    identified: dict[str, str] = {}
    if cleaner is not None and Rule.LANGUAGE not in cleaner.settings.off:
        identified["identified_by"] = identified_by(task.language, cleaner.settings.language_model)

    with explain_os_errors(task.stem.parent):
        judge = _Judge(task.language, cleaner, evaluation)
        rows, counts, shards = _write_shards(task, source, judge)
        # The figures of the report; `_write_shards` has written all files that they count.
        values = {
            "source": source.label,
            "made_from": made_from,
            "rows": dataclasses.asdict(rows),
            "documents": counts.documents,
            "kept": counts.documents - counts.dropped.total(),
            "characters": counts.characters,
            "dropped": dict(sorted(counts.dropped.items())),
            "masked": dict(sorted(cleaner.masked.items())) if cleaner is not None else {},
            "evaluation": dict(sorted(counts.evaluation.items())),
            **identified,
            "examples": dict(sorted(counts.examples.items())),
            "shards": [(shard.stem.name, shard.documents) for shard in shards],
        }
    with explain_os_errors(task.done):
        write_text(task.done, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _write_shards(
    task: CleaningTask, source: Source, judge: _Judge
) -> tuple[RowCounts, _PartCounts, list[Shard]]:
    """Writes the kept documents of a part into shards, and the dropped ones into their file if the settings
    ask for it.
    """
    settings = task.settings
    rows, counts = RowCounts(), _PartCounts()
    dropped_file = Path(settings.folder) / "dropped" / task.language / f"{task.stem.name}.jsonl.zst"
    keep_dropped = settings.cleaning is not None and settings.cleaning.keep_dropped
    with json_lines(dropped_file if keep_dropped else None) as write_dropped:
        writer = ShardWriter(task.stem, settings.shard_documents, settings.deduplication)
        try:
            for row in read_rows(source, settings.bad_rows, rows, task.part):
                try:
                    text, reason, file = judge(row.text)
                except BadRowError as problem:
                    rows.refuse(f"{row.source}, {row.id}", problem, settings.bad_rows)
                    continue
                counts.add(text, reason, file)
                cleaned = dataclasses.replace(row, text=text)
                # The text that cleaning changed, but the id, kind and score of the row.
                if reason is None:
                    writer.add(cleaned)
                else:
                    write_dropped({"reason": reason, "file": file, **dataclasses.asdict(cleaned)})
            shards = writer.close()
        except BaseException:
            writer.abandon()
            raise
    return rows, counts, shards


def _rules(cleaning: CleaningSettings, source: Source) -> CleaningSettings:
    return cleaning.model_copy(update={"off": (*cleaning.off, *source.off)})
