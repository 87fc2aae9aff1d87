"""Where samples go: the one placement function, and the arrays of one pack.

A pack has B text rows of L tokens and vision rows in classes of R rows of W patches (PackConfig).
A sample lies whole in one text row; each of its windows (an image, or a few frames) lies whole in
one vision row. Attention in a vision row costs W^2 whatever lies in it, so a window goes to the
smallest class that still has room for it.

`Waiting` holds samples and fills packs from them. The loader uses it through `place_pack`, on the
few samples that wait in its look-ahead; data/plan.py on a whole corpus.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import groupby, islice
from typing import NamedTuple

from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import DataError
from ov2_jax.data.sample import SampleSize

# Rooms are sorted as whole numbers, (room << _ROW) + row: several times quicker than as tuples.
_ROW = 16
_ROW_MASK = (1 << _ROW) - 1


class WindowPlace(NamedTuple):
    size: int  # index of the class in PackConfig.vision_rows
    row: int
    offset: int


class Placement(NamedTuple):
    """Where one sample of the candidates went."""

    sample: int  # index into the candidates
    row: int
    offset: int
    windows: tuple[WindowPlace, ...]


# A sample's windows as placement takes them: (patches of a window, windows), the largest first, for
# a small one must not take the room of a large one. Equal ones, as a clip's are, go in one go.
Runs = tuple[tuple[int, int], ...]


def runs_of(windows: Sequence[int]) -> Runs:
    return tuple((w, len([*same])) for w, same in groupby(sorted(windows, reverse=True)))


# Windows of one run that went into one vision row: (class, row, offset, number of windows); and a
# sample that went into a pack: (name, row, offset, chunks).
_Chunk = tuple[int, int, int, int]
Placed = tuple[int, int, int, Sequence[_Chunk]]


class Pack:
    """Free space while one pack is filled."""

    def __init__(self, config: PackConfig) -> None:
        self.seq_len = config.seq_len
        # Text rows that may take another sample, the fullest first; what they may still take.
        self.tokens = [(config.seq_len << _ROW) + row for row in range(config.rows)]
        self.samples = [config.max_samples_per_row or config.seq_len] * config.rows
        self.widths = [w for _, w in config.vision_rows]
        self.rows = [[(w << _ROW) + row for row in range(r)] for r, w in config.vision_rows]
        self.free_tokens = config.token_slots
        self.most_tokens = config.seq_len  # room in the emptiest text row
        self.patches = config.patch_slots  # room for patches in all
        self.largest = max(self.widths, default=0)  # room in the emptiest vision row
        self.holds: dict[int, int] = {}  # windows of a width for which there was no more room

    def _window(self, width: int) -> _Chunk | None:
        """Best fit in the smallest class with room; takes the room."""
        for size in range(bisect_left(self.widths, width), len(self.widths)):
            free = self.rows[size]
            i = bisect_left(free, width << _ROW)
            if i < len(free):
                code = free.pop(i)
                room = code >> _ROW
                insort(free, code - (width << _ROW))
                if room == self.largest:
                    self.largest = max([rows[-1] for rows in self.rows]) >> _ROW
                return size, code & _ROW_MASK, self.widths[size] - room, 1
        return None

    def _windows(self, runs: Runs) -> list[_Chunk] | None:
        """Every window as in _window, or none at all."""
        chunks: list[_Chunk] = []
        before = [rows.copy() for rows in self.rows]
        for width, count in runs:
            least = width << _ROW
            for size in range(bisect_left(self.widths, width), len(self.widths)):
                free = self.rows[size]
                i = bisect_left(free, least)
                while count and i < len(free):
                    # One window after the other would go here too: this row stays the fullest.
                    code = free.pop(i)
                    take = min(count, (code >> _ROW) // width)
                    insort(free, code - take * least)
                    offset = self.widths[size] - (code >> _ROW)
                    chunks.append((size, code & _ROW_MASK, offset, take))
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
        """Takes the room for a sample of so many patches in all, or returns None. It goes into the
        fullest text row with room."""
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


# Kinds of samples, by the share of a pack's patches that they take against that of its tokens: up
# to so much, and (tokens, patches) in which direction they so use up a pack.
_KINDS = (
    (0.0, (1.0, 0.0)),  # text
    (0.6, (1.0, 0.35)),
    (0.95, (1.0, 0.8)),
    (float("inf"), (0.95, 1.0)),
)
_MOST = tuple(most for most, _ in _KINDS)


class Waiting:
    """Samples that wait, and how a pack is filled from them.

    The oldest sample always goes in, so none waits forever; then the others, large before small,
    each into the fullest text row and vision rows with room. What does not fit goes on waiting. A
    sample's size is the larger of its shares of the two budgets. It counts less the less its kind
    suits the room that is left (the fourth power of the product of both directions): where patches
    run out before tokens text is preferred, so both budgets are used up together.

    Samples lie in a list a kind, sorted by size. While a pack is filled room only shrinks, so what
    did not fit once is not asked again: a pack walks every list once.
    """

    def __init__(self, config: PackConfig) -> None:
        self._config = config
        self._token_slots, self._patch_slots = config.token_slots, max(config.patch_slots, 1)
        # (-size, age, tokens, patches, largest window, name, runs)
        self._lists: list[list[tuple[int, int, int, int, int, int, Runs]]] = [[] for _ in _KINDS]
        self._kinds: dict[int, int] = {}  # by age
        self._next = self._oldest = 0
        self._density = 0.0  # most patches a token of any sample so far

    def __len__(self) -> int:
        return len(self._kinds)

    def add(self, name: int, tokens: int, patches: int, runs: Runs) -> None:
        """A new sample of so many patches in all. `name` is given back when it is packed."""
        age, self._next = self._next, self._next + 1
        kind, size, largest = 0, tokens, 0
        if patches:
            wants = -(-patches * self._token_slots // self._patch_slots)
            kind, size, largest = bisect_left(_MOST, wants / tokens), max(tokens, wants), runs[0][0]
            self._density = max(self._density, patches / tokens)
        self._kinds[age] = kind
        insort(self._lists[kind], (-size, age, tokens, patches, largest, name, runs))

    def fill(self) -> list[Placed]:
        """Takes a pack's samples out, in the order in which they were placed.

        The same samples added in that order, and nothing else, make the same pack: which one is
        next depends on the room that is left and on the sample alone. Raises DataError if the
        oldest sample does not fit into an empty pack; encoding must have rejected it.
        """
        if not self._kinds:
            return []
        pack = Pack(self._config)
        placed = [self._first(pack)]
        # A kind's direction, its list, and where in it the next is that may fit.
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
            # On to the next that may fit: by its size, then by its numbers.
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

    def _first(self, pack: Pack) -> Placed:
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
    """Fills one pack from candidates in order of arrival, as Waiting does; a pure function of
    lengths. Raises DataError if the oldest does not fit into an empty pack."""
    waiting = Waiting(config)
    for index, (tokens, windows) in enumerate(candidates):
        waiting.add(index, tokens, sum(windows), runs_of(windows))
    return [
        Placement(index, row, offset, _window_places(chunks, candidates[index].windows))
        for index, row, offset, chunks in waiting.fill()
    ]


def _window_places(chunks: Sequence[_Chunk], windows: Sequence[int]) -> tuple[WindowPlace, ...]:
    """The place of each window, in the sample's order."""
    order = iter(sorted(range(len(windows)), key=lambda i: -windows[i]))
    places: dict[int, WindowPlace] = {}
    for size, row, offset, count in chunks:
        for i in islice(order, count):
            places[i] = WindowPlace(size, row, offset)
            offset += windows[i]
    return tuple(places[i] for i in range(len(windows)))


def fits_alone(sample: SampleSize, config: PackConfig) -> bool:
    """Whether an empty pack holds the sample."""
    tokens, windows = sample
    return Pack(config).place(0, tokens, sum(windows), runs_of(windows)) is not None
