"""Words of letters with their marks.

The pre-tokenizers of GPT-2, Llama 3 and Qwen2 take letters alone as a word. In Burmese, Tamil, Hindi, Bengali
or Thai a vowel sign is no letter but a combining mark, so each mark ends a word: no token can be longer than
the letters between two marks. `joined` changes the pattern as Qwen3.5 has it: marks count as letters.
"""

import copy
import re
from typing import Any

# The pattern of ByteLevel with use_regex, in GPT-2's encoder.py.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The pattern of Qwen2's published tokenizer.json.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_LETTER, _MARK = r"\p{L}", r"\p{M}"
_CLASS = re.compile(r"\[[^\]]*\]")


def splits_marks(description: dict[str, Any]) -> bool:
    """Whether a tokenizer.json's pre-tokenizer splits words at combining marks."""
    return any(with_marks(pattern) != pattern for pattern in patterns(description.get("pre_tokenizer")))


def joined(description: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json with words of letters and marks."""
    changed = copy.copy(description)
    changed["pre_tokenizer"] = _joined(description["pre_tokenizer"])
    return changed


def with_marks(pattern: str) -> str:
    r"""A pattern in which marks count as letters.

    `[^\r\n\p{L}\p{N}]?\p{L}+` becomes `[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+`: the class before a word
    stays, as in Qwen3.5.
    """
    if _MARK in pattern or _LETTER not in pattern:
        return pattern

    def changed_class(found: re.Match[str]) -> str:
        is_before_word = found.string[found.end() : found.end() + 1] == "?"
        return found[0] if is_before_word else found[0].replace(_LETTER, _LETTER + _MARK)

    # Outside of a class \p{L} becomes a class of both; inside a class the marks are added to it.
    parts, end = [], 0
    for found in _CLASS.finditer(pattern):
        parts += [pattern[end : found.start()].replace(_LETTER, f"[{_LETTER}{_MARK}]"), changed_class(found)]
        end = found.end()
    return "".join([*parts, pattern[end:].replace(_LETTER, f"[{_LETTER}{_MARK}]")])


def patterns(pre_tokenizer: Any) -> list[str]:
    """The patterns by which a pre-tokenizer of a tokenizer.json splits text, in order."""
    if not isinstance(pre_tokenizer, dict):
        return []
    found: list[str] = []
    for inner in pre_tokenizer.get("pretokenizers") or []:
        found += patterns(inner)
    pattern = pre_tokenizer.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        found.append(pattern["Regex"])
    if pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True):
        found.append(GPT2_PATTERN)
    return found


def _joined(pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    if pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True):
        split = {"type": "Split", "pattern": {"Regex": with_marks(GPT2_PATTERN)}}
        steps = [split | {"behavior": "Isolated", "invert": False}, pre_tokenizer | {"use_regex": False}]
        return {"type": "Sequence", "pretokenizers": steps}
    if isinstance(pre_tokenizer.get("pretokenizers"), list):
        inner: list[dict[str, Any]] = []
        for step in map(_joined, pre_tokenizer["pretokenizers"]):
            # A ByteLevel that splits has become two steps; they join the others.
            inner += step["pretokenizers"] if step.get("type") == "Sequence" else [step]
        return pre_tokenizer | {"pretokenizers": inner}
    pattern = pre_tokenizer.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        return pre_tokenizer | {"pattern": {"Regex": with_marks(pattern["Regex"])}}
    return pre_tokenizer
