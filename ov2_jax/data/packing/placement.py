"""Where the samples of a pack go: their text row, and a vision row for each of their windows.

A pack has B text rows of L tokens and vision rows in classes of R rows of W patches (PackConfig).
A sample lies whole in one text row. Each of its windows (a picture, or a few frames) lies whole in
one vision row. Attention in a vision row costs W^2 whether the row is full or not, so a window goes
to the smallest class that still has room for it.

`Packer` holds samples that wait and fills packs from them. The loader calls it through `place_pack`
on the few samples of its look-ahead; planning.py uses it on a whole corpus.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import groupby, islice
from typing import NamedTuple

from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import DataError
from ov2_jax.data.sample import SampleSize

# Rows are sorted by their room as whole numbers, (room << _ROW) + row. This is several times faster
# than sorting tuples.
_ROW = 16
_ROW_MASK = (1 << _ROW) - 1


class WindowPlace(NamedTuple):
    """The place of one window."""

    row_class: int  # index into PackConfig.vision_rows
    row: int  # of the class
    offset: int  # patches of the row before it


class Placement(NamedTuple):
    """The place of one sample."""

    sample: int  # index into the candidates
    row: int  # of the pack's text rows
    offset: int  # tokens of the row before it
    windows: tuple[WindowPlace, ...]


# A sample's windows in runs of equal ones: (patches of a window, number of windows). The largest
# come first, because a small window must not take the room of a large one. A run, such as the
# windows of a clip, is placed in one step.
Runs = tuple[tuple[int, int], ...]


def runs_of(windows: Sequence[int]) -> Runs:
    return tuple((w, len([*same])) for w, same in groupby(sorted(windows, reverse=True)))


# Windows of one run that went into one vision row: (row class, row, offset, number of windows).
_Chunk = tuple[int, int, int, int]
# A sample that went into a pack: (name, row, offset, chunks).
Placed = tuple[int, int, int, Sequence[_Chunk]]


class PackSpace:
    """Free space while one pack is filled."""

    def __init__(self, config: PackConfig) -> None:
        self.seq_len = config.seq_len
        # Text rows that may take another sample, the fullest first, and how many samples each row
        # may still take.
        self.tokens = [(config.seq_len << _ROW) + row for row in range(config.rows)]
        self.samples = [config.max_samples_per_row or config.seq_len] * config.rows
        self.widths = [w for _, w in config.vision_rows]
        self.rows = [[(w << _ROW) + row for row in range(r)] for r, w in config.vision_rows]
        self.free_tokens = config.token_slots
        self.most_tokens = config.seq_len  # room in the emptiest text row
        self.patches = config.patch_slots  # room in all vision rows together
        self.largest = max(self.widths, default=0)  # room in the emptiest vision row
        self.holds: dict[int, int] = {}  # by width: how many windows fitted when some did not

    def _window(self, width: int) -> _Chunk | None:
        """Takes the room for one window: best fit in the smallest class with room."""
        for row_class in range(bisect_left(self.widths, width), len(self.widths)):
            free = self.rows[row_class]
            i = bisect_left(free, width << _ROW)
            if i < len(free):
                code = free.pop(i)
                room = code >> _ROW
                insort(free, code - (width << _ROW))
                if room == self.largest:
                    self.largest = max([rows[-1] for rows in self.rows]) >> _ROW
                return row_class, code & _ROW_MASK, self.widths[row_class] - room, 1
        return None

    def _windows(self, runs: Runs) -> list[_Chunk] | None:
        """Takes the room for all windows, each as in `_window`, or for none."""
        chunks: list[_Chunk] = []
        before = [rows.copy() for rows in self.rows]
        for width, count in runs:
            least = width << _ROW
            for row_class in range(bisect_left(self.widths, width), len(self.widths)):
                free = self.rows[row_class]
                i = bisect_left(free, least)
                while count and i < len(free):
                    # Placed one by one they would go here too: this row stays the fullest.
                    code = free.pop(i)
                    take = min(count, (code >> _ROW) // width)
                    insort(free, code - take * least)
                    offset = self.widths[row_class] - (code >> _ROW)
                    chunks.append((row_class, code & _ROW_MASK, offset, take))
                    count -= take
                    if count:
                        i = bisect_left(free, least)
                if not count:
                    break
            if count:
                self.rows = before
                if width == runs[0][0]:
                    self.holds[width] = runs[0][1] - count
                return None
        self.largest = max([rows[-1] for rows in self.rows]) >> _ROW
        return chunks

    def place(self, name: int, tokens: int, patches: int, runs: Runs) -> Placed | None:
        """Takes the room for a sample in the fullest text row with room, or returns None.

        `patches` is the sum over all windows of `runs`.
        """
        i = bisect_left(self.tokens, tokens << _ROW)
        if i == len(self.tokens) or patches > self.patches:
            return None
        chunks: Sequence[_Chunk] = ()
        if patches:
            if len(runs) == 1 and runs[0][1] == 1:
                chunk = self._window(patches)
                if chunk is None:
                    return None
                chunks = (chunk,)
            else:
                width, count = runs[0]
                if width > self.largest or count > self.holds.get(width, count):
                    return None
                found = self._windows(runs)
                if found is None:
                    return None
                chunks = found
            self.patches -= patches
        code = self.tokens.pop(i)
        row = code & _ROW_MASK
        self.free_tokens -= tokens
        self.samples[row] -= 1
        if self.samples[row]:
            insort(self.tokens, code - (tokens << _ROW))
        self.most_tokens = self.tokens[-1] >> _ROW if self.tokens else -1
        return name, row, self.seq_len - (code >> _ROW), chunks


# Kinds of samples, by the ratio of two shares: what a sample takes of a pack's patches, and of its
# tokens. An entry has the largest ratio of the kind, and the direction (tokens, patches) in which
# its samples use up a pack.
_KINDS = (
    (0.0, (1.0, 0.0)),  # text
    (0.6, (1.0, 0.35)),
    (0.95, (1.0, 0.8)),
    (float("inf"), (0.95, 1.0)),
)
_MOST = tuple(most for most, _ in _KINDS)


class Packer:
    """Samples that wait, and how a pack is filled from them.

    The oldest sample always goes in, so none waits for ever. The others follow, large before small,
    each into the fullest text row and vision rows with room. A sample that does not fit keeps
    waiting. The size of a sample is the larger of its shares of the two budgets, tokens and
    patches. Its size is multiplied by how well its kind suits the room that is left, the fourth
    power of the dot product of both directions: if patches run out before tokens, text is
    preferred, so that both budgets are used up together.

    Samples lie in one list for each kind, sorted by size. While a pack is filled its room only
    shrinks, so a sample that did not fit is not tried again: a pack walks every list once.
    """

    def __init__(self, config: PackConfig) -> None:
        self._config = config
        self._token_slots, self._patch_slots = config.token_slots, max(config.patch_slots, 1)
        # (-size, age, tokens, patches, largest window, name, runs)
        self._lists: list[list[tuple[int, int, int, int, int, int, Runs]]] = [[] for _ in _KINDS]
        self._kinds: dict[int, int] = {}  # by age
        self._next = self._oldest = 0
        self._density = 0.0  # the most patches per token of any sample so far

    def add(self, name: int, tokens: int, patches: int, runs: Runs) -> None:
        """Adds a sample; `patches` is the sum over all windows. `fill` returns its `name`."""
        age, self._next = self._next, self._next + 1
        kind, size, largest = 0, tokens, 0
        if patches:
            wants = -(-patches * self._token_slots // self._patch_slots)
            kind, size, largest = bisect_left(_MOST, wants / tokens), max(tokens, wants), runs[0][0]
            self._density = max(self._density, patches / tokens)
        self._kinds[age] = kind
        insort(self._lists[kind], (-size, age, tokens, patches, largest, name, runs))

    def fill(self) -> list[Placed]:
        """Takes the samples of a pack out, in the order in which they were placed.

        The same samples, added alone and in that order, make the same pack again: which sample is
        next depends only on the room that is left and on the samples. Raises DataError if the
        oldest sample does not fit into an empty pack; encoding should have rejected it.
        """
        if not self._kinds:
            return []
        pack = PackSpace(self._config)
        placed = [self._first(pack)]
        # A kind's direction, its list, and the index there of the next sample that may fit.
        heads = [
            [*direction, waiting, 0]
            for (_, direction), waiting in zip(_KINDS, self._lists, strict=True)
            if waiting
        ]
        while heads:
            tokens_left = pack.free_tokens / self._token_slots
            patches_left = pack.patches / self._patch_slots
            best, head = -1.0, heads[0]
            for other in heads:
                along_tokens, along_patches, waiting, i = other
                suits = along_tokens * tokens_left + along_patches * patches_left
                suits *= suits
                score = suits * suits * -waiting[i][0]
                if score > best:
                    best, head = score, other
            _, _, waiting, i = head
            _, age, tokens, patches, largest, name, runs = waiting[i]
            done = None
            if tokens <= pack.most_tokens and largest <= pack.largest:
                done = pack.place(name, tokens, patches, runs)
            if done is None:
                i += 1
            else:
                placed.append(done)
                del waiting[i], self._kinds[age]
            # On to the next sample that may fit: by its size, then by tokens, window and patches.
            most, room, free = pack.most_tokens, pack.largest, pack.patches
            end = len(waiting)
            if i < end and -waiting[i][0] > most:
                wants = min(free, int(self._density * most + 1)) if patches else 0
                bound = max(most, wants * self._token_slots // self._patch_slots + 1)
                i = bisect_left(waiting, (-bound,), i)
            while i < end:
                after = waiting[i]
                if after[2] <= most and after[4] <= room and after[3] <= free:
                    break
                i += 1
            head[-1] = i
            if i == end:
                heads = [other for other in heads if other is not head]
        return placed

    def _first(self, pack: PackSpace) -> Placed:
        while self._oldest not in self._kinds:
            self._oldest += 1
        waiting = self._lists[self._kinds.pop(self._oldest)]
        at = next(i for i, sample in enumerate(waiting) if sample[1] == self._oldest)
        _, _, tokens, patches, _, name, runs = waiting.pop(at)
        done = pack.place(name, tokens, patches, runs)
        if done is None:
            raise DataError(
                f"A sample of {tokens} tokens and {patches} patches "
                "does not fit into an empty pack."
            )
        return done


def place_pack(candidates: Sequence[SampleSize], config: PackConfig) -> list[Placement]:
    """Fills one pack from candidates in the order of their arrival: a pure function of lengths.

    Raises DataError if the oldest does not fit into an empty pack.
    """
    packer = Packer(config)
    for index, (tokens, windows) in enumerate(candidates):
        packer.add(index, tokens, sum(windows), runs_of(windows))
    return [
        Placement(index, row, offset, _window_places(chunks, candidates[index].windows))
        for index, row, offset, chunks in packer.fill()
    ]


def _window_places(chunks: Sequence[_Chunk], windows: Sequence[int]) -> tuple[WindowPlace, ...]:
    """The place of each window, in the sample's order."""
    order = iter(sorted(range(len(windows)), key=lambda i: -windows[i]))
    places: dict[int, WindowPlace] = {}
    for row_class, row, offset, count in chunks:
        for i in islice(order, count):
            places[i] = WindowPlace(row_class, row, offset)
            offset += windows[i]
    return tuple(places[i] for i in range(len(windows)))


def fits_alone(sample: SampleSize, config: PackConfig) -> bool:
    """Whether an empty pack holds the sample."""
    tokens, windows = sample
    return PackSpace(config).place(0, tokens, sum(windows), runs_of(windows)) is not None
