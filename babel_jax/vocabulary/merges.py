"""Continued byte-pair encoding (Sennrich et al. 2016): more merges, learned on words that are already split
into the tokens of an existing vocabulary.

Each step merges the pair of neighbouring tokens that occurs most often, in all words. Counts of pairs are
kept up to date: a step reads only the words that have its pair. Learned merges come after all merges of the
existing vocabulary, so an encoder that applies merges in this order gives the same tokens as the training.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Word:
    """A word as ids of existing tokens; `counts`: its occurrences by the number of the group."""

    ids: Sequence[int]
    counts: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class NewToken:
    """A learned token: its text as in the vocabulary, its two parts (ids; learned tokens count on after the
    existing ones), the group that asked for it, and its number of occurrences when it was learned.
    """

    text: str
    parts: Pair
    group: int
    count: int


@dataclasses.dataclass(frozen=True)
class Learned:
    """The new tokens in order, and all merges in order: (left id, right id, id of the result)."""

    tokens: Sequence[NewToken]
    merges: Sequence[tuple[int, int, int]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of the tokens that may be learned.

    quotas: the number of tokens for each group. least: the least occurrences of a pair in its group.
    protected: the group whose words should stay as they are, if any; `tolerance`: the part of its words that
    may change. forbidden: pairs that are never merged. allowed: says if a text may be a token. by_text:
    SentencePiece merges any two pieces whose text together is a piece; other encoders merge listed pairs
    alone.
    """

    quotas: Mapping[int, int]
    least: int
    allowed: Callable[[str], bool]
    protected: int | None = None
    tolerance: float = 0.0
    forbidden: frozenset[Pair] = frozenset()
    by_text: bool = False


def learn(words: Sequence[Word], texts: Sequence[str], limits: Limits) -> Learned:
    """Learns up to the quota of each group; fewer if no further pair occurs often enough.

    texts: the text of each existing token by id. The next token is for the group that has the smallest part
    of its quota. Equal counts are decided by ids, so the result does not depend on the order of the words.
    """
    return _Learner(words, texts, limits).run()


class _Learner:
    def __init__(self, words: Sequence[Word], texts: Sequence[str], limits: Limits):
        self._limits = limits
        self._words = [list(word.ids) for word in words]
        self._weights = [tuple(word.counts.items()) for word in words]
        self._texts = list(texts)
        self._ids = {text: number for number, text in enumerate(texts)}
        self._existing = len(texts)
        groups = set(limits.quotas)
        for word in words:
            groups.update(word.counts)
        self._counts: dict[int, dict[Pair, int]] = {group: {} for group in groups}
        # The words that have a pair, by number; some of them may have lost it since.
        self._where: dict[Pair, set[int]] = {}
        # Merges that follow from a merge at once, without a new token.
        self._aliases: list[tuple[Pair, int]] = []
        for number in range(len(self._words)):
            for pair in _pairs(self._words[number]):
                self._add(pair, number, 1)
        # Entries are not removed when a count changes, which a heap cannot do fast: `_best` drops old ones.
        self._heaps: dict[int, list[tuple[int, Pair]]] = {}
        for group in limits.quotas:
            self._heaps[group] = [(-count, pair) for pair, count in self._counts[group].items()]
            heapq.heapify(self._heaps[group])
        self._refused = set(limits.forbidden)
        # The number of protected words (each as often as it occurs) that may still change.
        total = 0
        if limits.protected is not None:
            total = sum(word.counts.get(limits.protected, 0) for word in words)
        self._may_change = limits.tolerance * total
        self._tokens: list[NewToken] = []
        self._merges: list[tuple[int, int, int]] = []

    def run(self) -> Learned:
        learned = dict.fromkeys(self._limits.quotas, 0)
        open_groups = {group for group, quota in self._limits.quotas.items() if quota}
        while open_groups:
            # The group that has the smallest part of its quota, so that all are done at about the same time.
            group = min(open_groups, key=lambda group: (learned[group] / self._limits.quotas[group], group))
            best = self._best(group)
            if best is None:
                open_groups.discard(group)
                continue
            pair, count = best
            text = self._texts[pair[0]] + self._texts[pair[1]]
            # Two ways to one token: the second one is a merge without a new token.
            number = self._ids.get(text)
            if number is None:
                number = len(self._texts)
                self._texts.append(text)
                self._ids[text] = number
                self._tokens.append(NewToken(text, pair, group, count))
                learned[group] += 1
                if learned[group] == self._limits.quotas[group]:
                    open_groups.discard(group)
            self._apply(pair, number)
            while self._aliases:
                self._apply(*self._aliases.pop())
        return Learned(self._tokens, self._merges)

    def _best(self, group: int) -> tuple[Pair, int] | None:
        """The allowed pair with the highest count in a group; None if none occurs often enough."""
        heap, counts = self._heaps[group], self._counts[group]
        while heap:
            count, pair = heap[0]
            actual = counts.get(pair, 0)
            if actual != -count:
                # The count fell since the entry was made; a count that rose has an entry of its own.
                heapq.heappop(heap)
                if actual and actual < -count:
                    heapq.heappush(heap, (-actual, pair))
                continue
            if actual < self._limits.least:
                return None
            heapq.heappop(heap)
            if self._is_allowed(pair):
                return pair, actual
        return None

    def _is_allowed(self, pair: Pair) -> bool:
        if pair in self._refused:
            return False
        text = self._texts[pair[0]] + self._texts[pair[1]]
        known = self._ids.get(text)
        allowed = known is None or (not self._limits.by_text and known >= self._existing)
        allowed = allowed and self._limits.allowed(text)
        if allowed and self._limits.protected is not None:
            # Each merge uses up a part of the protected words that may change; nothing gives it back.
            changed = self._counts[self._limits.protected].get(pair, 0)
            allowed = changed <= self._may_change
            if allowed:
                self._may_change -= changed
        if not allowed:
            self._refused.add(pair)
        return allowed

    def _apply(self, pair: Pair, number: int) -> None:
        """Merges a pair in all words that have it."""
        places = self._where.pop(pair, None)
        if not places:
            return
        self._merges.append((*pair, number))
        raised: set[Pair] = set()
        # Words that no longer contain the pair are found too; they do not change.
        for place in sorted(places):
            self._words[place] = self._merge_in(place, pair, number, raised)
        for group, heap in self._heaps.items():
            counts = self._counts[group]
            # A pair whose count rose needs a new entry: its old entries have too small a count.
            for new in raised:
                if new in counts:
                    heapq.heappush(heap, (-counts[new], new))
        if self._limits.by_text:
            # In SentencePiece such a pair becomes the known piece at once.
            for new in sorted(raised):
                known = self._ids.get(self._texts[new[0]] + self._texts[new[1]])
                if known is not None:
                    self._aliases.append((new, known))

    def _merge_in(self, place: int, pair: Pair, number: int, raised: set[Pair]) -> list[int]:
        """A word with each occurrence of a pair replaced, from the left; counts only its changed pairs."""
        # From the left, as encoders do: in a a a the first two are merged.
        left, right = pair
        ids, result = self._words[place], []
        position, last = 0, len(ids) - 1
        while position <= last:
            if position == last or ids[position] != left or ids[position + 1] != right:
                result.append(ids[position])
                position += 1
                continue
            self._add(pair, place, -1)
            if result:
                # The neighbour before may itself be a token that was just made.
                self._add((result[-1], left), place, -1)
                self._add((result[-1], number), place, 1)
                raised.add((result[-1], number))
            if position + 2 <= last:
                self._add((right, ids[position + 2]), place, -1)
                self._add((number, ids[position + 2]), place, 1)
                raised.add((number, ids[position + 2]))
            result.append(number)
            position += 2
        return result

    def _add(self, pair: Pair, place: int, sign: int) -> None:
        for group, weight in self._weights[place]:
            counts = self._counts[group]
            count = counts.get(pair, 0) + sign * weight
            if count:
                counts[pair] = count
            else:
                counts.pop(pair, None)
        if sign > 0:
            self._where.setdefault(pair, set()).add(place)


def _pairs(ids: Sequence[int]) -> Iterable[Pair]:
    return itertools.pairwise(ids)
