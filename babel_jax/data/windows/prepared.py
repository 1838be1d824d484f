"""The layout of a folder of prepared data, and reading it.

SHA256SUMS                  digests of the files beside it, of languages/ and heldout/; those of windows are
beside them settings.json               what it was made from; other settings are refused on the same folder
languages/xx.json           counts of a language's rows; written once they have been read heldout/xx.jsonl
text to evaluate on, with keys id, text and kind windows/xx-KIND/1.0.0/      TFDS dataset `windows/xx-KIND` of
packed windows windows/xx-KIND/counts.json its tokens, documents, bytes of text and windows cleaned/,
duplicates/, dropped/  the text behind them, where it was cleaned: see shards.py, cleaned_parts.py,
duplicates.py prepared.json               the report; written last, so a folder that has it is whole
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from babel_jax.data.json_files import read_json
from babel_jax.data.sources.rows import Row
from babel_jax.data.tokens.tokenizers import Tokenizer
from babel_jax.digests import SUMS, file_sum
from babel_jax.errors import BadInput
from babel_jax.places import place, pull

REPORT, SETTINGS, COUNTS = "prepared.json", "settings.json", "counts.json"


def dataset_folder(folder: Path, language: str, kind: str) -> Path:
    """Where the windows of a language and kind are."""
    return folder / "windows" / f"{language}-{kind}"


def language_file(folder: Path, language: str) -> Path:
    """Where the counts of a language's rows are."""
    return folder / "languages" / f"{language}.json"


def heldout_file(folder: Path, language: str) -> Path:
    """Where the held-out text of a language is."""
    return folder / "heldout" / f"{language}.jsonl"


@dataclasses.dataclass(frozen=True)
class Supply:
    """What there is of a dataset: `tokens` without padding, in so many windows."""

    tokens: int
    windows: float

    @property
    def tokens_per_window(self) -> float:
        """The mean: fewer than a window holds, where conversations do not fill it."""
        return self.tokens / self.windows


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A finished folder.

    `report` is prepared.json: seq_len, tokenizer, and by language the counts of rows and of each kind's
    dataset.
    """

    folder: Path
    report: dict[str, Any]

    @property
    def seq_len(self) -> int:
        """Tokens in a window."""
        return self.report["seq_len"]

    @property
    def tokenizer_fingerprint(self) -> str:
        """`Tokenizer.fingerprint` of the tokenizer that made the windows."""
        return self.report["tokenizer"]["fingerprint"]

    @property
    def fingerprint(self) -> str:
        """A digest of the settings and the text that the windows were made from, and of their counts.

        The same text prepared again, wherever and whenever, has the same one.
        """
        hashed = hashlib.blake2b(
            json.dumps(read_json(self.folder / SETTINGS), sort_keys=True).encode(), digest_size=16
        )
        for language in sorted(self.languages):
            entry = dict(self.report["languages"][language])
            described = [dict(source) for source in entry.pop("sources", [])]
            for source in described:
                source.pop("path", None)
                source["files"] = [file.get("digest") for file in (source.get("files") or {}).values()]
            for name in ("located", "cleaning"):  # they name paths
                entry.pop(name, None)
            hashed.update(json.dumps([language, entry, described], sort_keys=True).encode())
        return hashed.hexdigest()

    @property
    def begin_ids(self) -> list[int]:
        """The token ids that each document begins with; none where no bos_token does."""
        return self.report["tokenizer"].get("begin_ids", [])

    @property
    def chat_template(self) -> str | None:
        """`ChatFormat.fingerprint` of the chat template by which conversations became windows; None where
        they are of text.
        """
        return read_json(self.folder / SETTINGS).get("chat_template")

    def check_tokenizer(self, tokenizer: Tokenizer, conversations: bool) -> None:
        """Raises BadInput where the windows were made with another tokenizer, or their documents begin
        otherwise than its texts.
        """
        if self.tokenizer_fingerprint != tokenizer.fingerprint:
            raise BadInput(
                f"{self.folder}: prepared with another tokenizer than the model's; prepare another folder "
                "with this one"
            )
        if not conversations and self.begin_ids != tokenizer.begin_ids:
            raise BadInput(
                f"{self.folder}: each document begins with the token ids {self.begin_ids}, and the "
                "tokenizer begins a text with "
                f"{tokenizer.begin_ids}; prepare another folder, or set data.add_bos_token as it was then"
            )

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages, in the report's order."""
        return tuple(self.report["languages"])

    @property
    def available(self) -> dict[tuple[str, str], int]:
        """Tokens of each language and kind; document ends count, padding does not."""
        return {
            (language, kind): counts["tokens"]
            for language, entry in self.report["languages"].items()
            for kind, counts in entry["kinds"].items()
        }

    @property
    def supplies(self) -> dict[tuple[str, str], Supply]:
        """The same tokens with the windows that hold them."""
        kinds = {language: entry["kinds"] for language, entry in self.report["languages"].items()}
        return {
            (language, kind): Supply(counts["tokens"], counts.get("windows", counts["tokens"] / self.seq_len))
            for language, own in kinds.items()
            for kind, counts in own.items()
        }

    def heldout(self, language: str) -> list[Row]:
        """The held-out rows of a language.

        Raises BadInput where the text is not what was held out: figures of it would mean nothing.
        """
        file, written = (
            heldout_file(self.folder, language),
            self.report["languages"][language].get("heldout_sha256"),
        )
        if written is not None and file_sum(file, stored=False) != written:
            raise BadInput(
                f"{file}: not as it was written; remove the folder {self.folder} and run `babel prepare` "
                "again"
            )
        with open(file, encoding="utf-8") as lines:
            return [Row(**json.loads(line)) for line in lines]


def open_prepared(folder: Path | str) -> PreparedData:
    """A folder that `prepare` finished. Raises BadInput when it is missing, unfinished or unreadable."""
    folder = place(folder)
    pull(folder, is_beside_text)
    if not (folder / REPORT).is_file():
        state = "is not finished" if (folder / SETTINGS).is_file() else "is no folder of prepared data"
        raise BadInput(f"{folder}: {state} (it has no {REPORT}); run `babel prepare`")
    prepared = PreparedData(folder, read_json(folder / REPORT))
    try:
        needed = [dataset_folder(folder, *dataset) for dataset in prepared.available]
        complete = bool(prepared.seq_len and prepared.tokenizer_fingerprint)
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise BadInput(
            f"{folder / REPORT}: damaged; remove the folder {folder} and run `babel prepare` again"
        )
    absent = [
        path
        for path in [*needed, *(heldout_file(folder, language) for language in prepared.languages)]
        if not path.exists()
    ]
    if absent:
        raise BadInput(f"{absent[0]}: missing; remove the folder {folder} and run `babel prepare` again")
    return prepared


def is_prepared(folder: Path | str) -> bool:
    """Whether a folder, which may be in a bucket, is one that `prepare` finished."""
    path = place(folder)
    pull(path, lambda name: name == REPORT)
    return (path / REPORT).is_file()


def is_no_window(name: str) -> bool:
    """Whether a file, by its name within the folder, is none of the dataset of windows itself."""
    return not (name.startswith("windows/") and name.count("/") > 2)


def is_beside_text(name: str) -> bool:
    """Whether a file is one that every reader of the folder needs; windows come when they are opened, by name
    within the folder.
    """
    top, _, rest = name.partition("/")
    return top in (REPORT, SETTINGS, SUMS, "languages", "heldout") or (
        top == "windows" and rest.count("/") == 1
    )
