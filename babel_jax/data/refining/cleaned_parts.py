"""The parts of sources, each cleaned into shards of its own: a task's last file says that it is done.

`shards.py` describes the files; beside them are, where `keep_dropped` is set,

dropped/xx/SSS-PPPPP.jsonl.zst  the documents that cleaning dropped, with the reason
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babel_jax.config import CleaningSettings, DataSettings, Source
from babel_jax.data.json_files import read_json
from babel_jax.data.refining.cleaning import Cleaner
from babel_jax.data.refining.decontamination import evaluation_text
from babel_jax.data.refining.shards import ShardWriter, json_lines, part_files
from babel_jax.data.sources.origins import changed_text, origin_of
from babel_jax.data.sources.records import parts
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.data.sources.streams import BadRowError
from babel_jax.disk_errors import explain_os_errors
from babel_jax.files import PARTIAL, remove_folder, write_text

DUPLICATES = "duplicates.json"  # beside the parts of a language, once its duplicates have been removed


@dataclasses.dataclass(frozen=True)
class CleaningTask:
    """Cleans one part of the source of this number among the language's; `number` is that of the part."""

    settings: DataSettings
    language: str
    source: int
    number: int
    part: str

    @property
    def stem(self) -> Path:
        """Where its files go, without a suffix."""
        return cleaned_folder(self.settings, self.language) / f"{self.source:03d}-{self.number:05d}"

    @property
    def done(self) -> Path:
        """The file that says it is done."""
        return self.stem.with_suffix(".json")

    def made_from(self) -> dict[str, Any]:
        """What tells its text from other text: the source's settings, the part, and its origin.

        Reads the text of files.
        """
        source = sources_of(self.settings, self.language)[self.source]
        return {**source.model_dump(mode="json"), "part": self.part, **origin_of(source, self.part)}

    def is_of(self, before: dict[str, Any], recheck: bool) -> bool:
        """Whether what was cleaned `before`, by its `made_from`, is the text that there is now."""
        source = sources_of(self.settings, self.language)[self.source]
        return before.get("part") == self.part and changed_text(before, source, self.part, recheck) is None


def cleaned_folder(settings: DataSettings, language: str) -> Path:
    """Where the shards of a language are."""
    return Path(settings.folder) / "cleaned" / language


def sources_of(settings: DataSettings, language: str) -> list[Source]:
    """The sources of a language, in the order of the settings, each with a label of its own.

    Weights, licences and counts are kept by label. Two sources that read one file by `where` get what they
    ask for into their names.
    """
    own = [source for source in settings.sources if source.language == language]
    times = Counter(source.label for source in own)
    seen = Counter[str]()
    named = []
    for source in own:
        label = source.label
        if times[label] > 1:
            asked = ", ".join(f"{key} = {value}" for key, value in source.where.items())
            name = f"{label} ({asked})" if asked else label
            seen[name] += 1
            source = source.model_copy(
                update={"name": name if seen[name] == 1 and asked else f"{name} #{seen[name]}"}
            )
        named.append(source)
    return named


def cleaning_tasks(settings: DataSettings, language: str) -> list[CleaningTask]:
    """A task for each part of each source of a language."""
    return [
        CleaningTask(settings, language, number, place, part)
        for number, source in enumerate(sources_of(settings, language))
        for place, part in enumerate(parts(source))
    ]


def forget_other_text(
    settings: DataSettings, language: str, tasks: Sequence[CleaningTask], recheck: bool = False
) -> None:
    """A run that was stopped may go on with other text: parts that were cleaned from what is no longer there
    are removed.

    Where duplicates have been looked for, all of the language is done again: what was compared is not the
    same any more.
    """
    folder, links = cleaned_folder(settings, language), Path(settings.folder) / "links" / language
    wanted = {task.done: task for task in tasks}
    done = part_files(folder)
    other = [
        path
        for path in done
        if path not in wanted or not wanted[path].is_of(read_json(path).get("made_from", {}), recheck)
    ]
    was_compared = links.exists() or (folder / DUPLICATES).is_file()
    if not other and (len(done) == len(tasks) or not was_compared):
        return
    with explain_os_errors(folder):
        if was_compared:
            remove_aside(Path(settings.folder), language)
            folder.rename(_aside(Path(settings.folder), language))  # gone in one step
            folder.mkdir()
            remove_folder(links)
            remove_aside(Path(settings.folder), language)
        else:
            for path in other:
                path.unlink()
                for shard in folder.glob(f"{path.stem}-*"):
                    shard.unlink()


def _aside(prepared: Path, language: str) -> Path:
    return prepared / "cleaned" / f"{language}{PARTIAL}"


def remove_aside(prepared: Path, language: str) -> None:
    """Removes the shards of other text, also those that a killed process had begun to remove."""
    remove_folder(_aside(prepared, language))


def clean_part(task: CleaningTask) -> None:
    """Writes the shards of one part, what was dropped of it, and last its counts."""
    settings = task.settings
    source = sources_of(settings, task.language)[task.source]
    made_from = task.made_from()
    clean = None if settings.cleaning is None else Cleaner(_rules(settings.cleaning, source), task.language)
    evaluation = None if settings.decontamination is None else evaluation_text(settings.decontamination)
    rows = RowCounts()
    dropped, found_in = Counter[str](), Counter[str]()
    documents = characters = 0
    dropped_file = Path(settings.folder) / "dropped" / task.language / f"{task.stem.name}.jsonl.zst"
    keep_dropped = settings.cleaning is not None and settings.cleaning.keep_dropped
    with (
        explain_os_errors(task.stem.parent),
        json_lines(dropped_file if keep_dropped else None) as write_dropped,
    ):
        writer = ShardWriter(task.stem, settings.shard_documents, settings.deduplication)
        try:
            for row in read_rows(source, settings.bad_rows, rows, task.part):
                text, rule, file = row.text, None, None
                try:
                    document, rule = clean.judged(text) if clean is not None else (None, None)
                    if evaluation is not None and rule is None:
                        # Before personal data is masked, which evaluation items hold as they are.
                        file = evaluation.file_of(text, task.language)
                    if clean is not None and document is not None:
                        text = (
                            clean.without_personal_data(document)
                            if rule is None and file is None
                            else document.text
                        )
                except BadRowError as problem:
                    rows.refuse(f"{row.source}, {row.id}", problem, settings.bad_rows)
                    continue
                documents += 1
                if file is not None:
                    found_in[file] += 1
                reason = rule if file is None else "evaluation"
                if reason is not None:
                    dropped[reason] += 1
                    write_dropped(
                        {
                            "reason": reason,
                            "file": file,
                            **dataclasses.asdict(dataclasses.replace(row, text=text)),
                        }
                    )
                    continue
                characters += len(text)
                writer.add(dataclasses.replace(row, text=text))
            shards = writer.close()
        except BaseException:
            writer.abandon()
            raise
        counts = {
            "source": source.label,
            "made_from": made_from,
            "rows": dataclasses.asdict(rows),
            "documents": documents,
            "kept": documents - dropped.total(),
            "characters": characters,
            "dropped": dict(sorted(dropped.items())),
            "masked": dict(sorted(clean.masked.items())) if clean is not None else {},
            "evaluation": dict(sorted(found_in.items())),
            "shards": [(shard.stem.name, shard.documents) for shard in shards],
        }
    with explain_os_errors(task.done):
        write_text(task.done, json.dumps(counts, indent=2, ensure_ascii=False) + "\n")


def _rules(cleaning: CleaningSettings, source: Source) -> CleaningSettings:
    return cleaning.model_copy(update={"off": (*cleaning.off, *source.off)})
