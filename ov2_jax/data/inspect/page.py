"""The report as one HTML page: statistics, the page's data as JSON, and the template."""

import base64
import collections
import hashlib
import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Int8
from markupsafe import Markup, escape

from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.data.encoding.tokenizer import SPECIAL_TOKENS, Tokenizer, token_ids
from ov2_jax.data.inspect.media import (
    CODEC,
    FRAMES,
    PICTURE,
    ShownMedia,
    TextSpan,
    media_of,
    sample_kind,
    text_spans,
    window_kinds,
)
from ov2_jax.data.inspect.packs import LOSS, SeenPack, SeenSample
from ov2_jax.data.rejected import Rejected

KINDS = ("text", "picture", "pictures", "clip", "codec clip")  # of samples
_WINDOW_KINDS = (PICTURE, FRAMES, CODEC)
_BINS = 28
_LOGARITHMIC = 16  # times the smallest value
_FILES = Path(__file__).with_name("assets")


class SampleRow(NamedTuple):
    """What the page has of every sample, shown in detail or not."""

    id: str
    source: str
    task: str
    kind: str
    file: str
    line: int
    tokens: int
    loss: int
    patches: int
    windows: int
    pack: int
    dropped: int
    fallbacks: int


class Detail(NamedTuple):
    """A sample with its text and pictures."""

    number: int
    row: SampleRow
    spans: list[TextSpan]
    media: list[ShownMedia]


class Collector:
    """Takes packs one after the other and keeps what the page needs of them.

    `details` is how many samples are kept with their pictures. Each combination of data set, task
    and kind gets one before any gets a second.
    """

    def __init__(
        self, pack: PackConfig, model: ModelConfig, names: Sequence[str], details: int
    ) -> None:
        self._config, self._model, self._names, self._wanted = pack, model, names, details
        self.rows: list[SampleRow] = []
        self.packs: list[dict[str, Any]] = []
        self.windows: list[tuple[int, str]] = []  # patches, kind of the sample
        self._met: collections.Counter = collections.Counter()
        self._kept: list[tuple[int, int, SeenSample]] = []  # heap: the one to give up first
        self._seen: set[tuple[str, int]] = set()
        self._class_patches = [0] * len(pack.vision_rows)

    def add(self, pack: SeenPack) -> None:
        """Rows of a pack hold [sample, offset, kind, tokens, kind, tokens, ...] for each sample,
        vision rows [sample, offset, patches, kind of window] for each window."""
        rows: list[list] = [[] for _ in range(self._config.rows)]
        vision: list[list] = [[[] for _ in range(r)] for r, _ in self._config.vision_rows]
        for sample in pack.samples:
            number, kinds = len(self.rows), window_kinds(sample)
            self._add_sample(sample, number, sample_kind(kinds))
            rows[sample.row].append([number, sample.offset, *_lengths(sample.kinds)])
            for size, place, kind in zip(sample.windows, sample.places, kinds, strict=True):
                entry = [number, place.offset, size, _WINDOW_KINDS.index(kind)]
                vision[place.row_class][place.row].append(entry)
        for k, patches in enumerate(pack.info.class_patches):
            self._class_patches[k] += patches
        self.packs.append(
            {
                "rows": rows,
                "vision": vision,
                "tokens": pack.info.tokens,
                "supervised": pack.info.supervised_tokens,
                "patches": sum(pack.info.class_patches),
            }
        )

    def _add_sample(self, sample: SeenSample, number: int, kind: str) -> None:
        self.rows.append(
            SampleRow(
                id=sample.id,
                source=sample.source,
                task=sample.task,
                kind=kind,
                file=sample.file,
                line=sample.line,
                tokens=len(sample.tokens),
                loss=int(np.count_nonzero(sample.kinds == LOSS)),
                patches=len(sample.patches),
                windows=len(sample.windows),
                pack=len(self.packs),
                dropped=sample.dropped_rounds,
                fallbacks=sample.uniform_fallbacks,
            )
        )
        self.windows.extend((size, kind) for size in sample.windows)
        if (sample.file, sample.line) in self._seen or not self._wanted:
            return  # a sample of a further epoch
        self._seen.add((sample.file, sample.line))
        key = sample.source, sample.task, kind
        entry = (-self._met[key], -number, sample)
        self._met[key] += 1
        if len(self._kept) < self._wanted:
            heapq.heappush(self._kept, entry)
        else:
            heapq.heappushpop(self._kept, entry)

    def details(self, tokenizer: Tokenizer) -> list[Detail]:
        special = frozenset(i for token in SPECIAL_TOKENS for i in token_ids(tokenizer, token))
        kept = sorted((-number, sample) for _, number, sample in self._kept)
        return [
            Detail(
                number,
                self.rows[number],
                text_spans(sample, tokenizer, special),
                media_of(sample, tokenizer, self._model.vision),
            )
            for number, sample in kept
        ]

    # --- statistics -------------------------------------------------------------------------------

    def usage(self) -> list[tuple[str, int, int]]:
        """(name, filled, slots) of tokens, loss, patches and every row class."""
        packs, config = len(self.packs), self._config
        tokens = sum(p["tokens"] for p in self.packs)
        loss = sum(p["supervised"] for p in self.packs)
        bars = [
            ("Token slots filled", tokens, packs * config.token_slots),
            ("Tokens with loss", loss, tokens),
        ]
        if config.vision_rows:
            patches = sum(self._class_patches)
            bars.append(("Patch slots filled", patches, packs * config.patch_slots))
        for (r, w), n in zip(config.vision_rows, self._class_patches, strict=True):
            bars.append((f"in {r} vision row{'s' * (r > 1)} of {w}", n, packs * r * w))
        return bars

    def shares(self) -> list[dict[str, Any]]:
        """Samples, tokens, tokens with loss and patches of every data set."""
        fields = ("samples", "tokens", "loss", "patches")
        total = collections.Counter()
        by_name = {name: collections.Counter(dict.fromkeys(fields, 0)) for name in self._names}
        for row in self.rows:
            values = {"samples": 1, **{f: getattr(row, f) for f in fields[1:]}}
            by_name[row.source].update(values)
            total.update(values)
        return [
            {"name": name, **{f: (n[f], n[f] / max(1, total[f])) for f in fields}}
            for name, n in by_name.items()
        ]

    def tally(self, field: str) -> list[tuple[str, int]]:
        """Samples by kind or task, most frequent first."""
        return collections.Counter(getattr(r, field) for r in self.rows).most_common()

    def histograms(self) -> list[dict[str, Any]]:
        with_patches = [row for row in self.rows if row.patches]
        found = [
            ("Tokens of a sample", [(r.tokens, r.kind) for r in self.rows]),
            ("Patches of a sample, if any", [(r.patches, r.kind) for r in with_patches]),
            ("Windows of a sample, if any", [(r.windows, r.kind) for r in with_patches]),
            ("Patches of a window", self.windows),
        ]
        return [{"title": title, **histogram(values)} for title, values in found if values]


def _lengths(kinds: Int8[np.ndarray, " n"]) -> list[int]:
    """Run lengths: kind, tokens, kind, tokens, ..."""
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    lengths = np.diff(starts, append=len(kinds))
    return np.column_stack([kinds[starts], lengths]).reshape(-1).tolist()


def histogram(values: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Bins of whole numbers with their counts by kind of sample; there is at least one value.

    Lengths of pictures and of clips differ a hundredfold. Then the widths of the bins grow by a
    constant factor instead of being equal.
    """
    numbers = np.array([n for n, _ in values])
    low, high = int(numbers.min()), int(numbers.max())
    logarithmic = high > _LOGARITHMIC * low
    spaced = np.geomspace if logarithmic else np.linspace
    edges = np.unique(np.ceil(spaced(low, high + 1, min(_BINS, high + 1 - low) + 1) - 1e-6))
    which = np.searchsorted(edges, numbers, side="right") - 1
    bins = [
        {"low": int(start), "high": int(end) - 1, "counts": [0] * len(KINDS)}
        for start, end in zip(edges[:-1], edges[1:], strict=True)
    ]
    for i, (_, kind) in zip(which.tolist(), values, strict=True):
        bins[i]["counts"][KINDS.index(kind)] += 1
    return {
        "low": low,
        "high": high,
        "logarithmic": logarithmic,
        "bins": bins,
        "highest": max(sum(b["counts"]) for b in bins),
        "median": float(np.median(numbers)),
        "mean": float(numbers.mean()),
    }


# --- the page -------------------------------------------------------------------------------------


def _lines(text: str) -> Markup:
    """The escaped text, with an empty element before every newline in which the style sheet draws a
    sign: long lines wrap, and a newline must look different."""
    return escape(text).replace("\n", Markup('<i class="nl"></i>\n'))


def render(
    collector: Collector,
    details: Sequence[Detail],
    rejected: Sequence[Rejected],
    *,
    title: str,
    command: str,
    checked: str,
    origin: str,
    epoch: int,
    seed: int,
    pack: PackConfig,
    model: ModelConfig,
) -> str:
    """The whole page. All text from the data is escaped, and the page's policy allows no script but
    its own and no request."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FILES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["n"] = lambda number: f"{number:,}".replace(",", "\u202f")
    environment.filters["lines"] = _lines
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}\u202f%"
    script = (_FILES / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    by_reason: dict[str, list[Rejected]] = {}
    for sample in sorted(rejected, key=lambda r: (r.file, r.line)):
        by_reason.setdefault(sample.reason, []).append(sample)
    vision = model.vision
    return environment.get_template("page.html").render(
        title=title,
        command=command,
        css=Markup((_FILES / "page.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=digest,
        details=details,
        reasons=sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])),
        rejected=len(rejected),
        checked=checked,
        origin=origin,
        epoch=epoch,
        seed=seed,
        rows=collector.rows,
        usage=collector.usage(),
        shares=collector.shares(),
        kinds=collector.tally("kind"),
        tasks=collector.tally("task"),
        all_kinds=KINDS,
        histograms=collector.histograms(),
        pack=pack,
        block=vision.patch_size * vision.spatial_merge_size,
        merge=vision.spatial_merge_size,
        data={
            "seq_len": pack.seq_len,
            "vision_rows": pack.vision_rows,
            "sources": [share["name"] for share in collector.shares()],
            "samples": [row._asdict() for row in collector.rows],
            "packs": collector.packs,
            "block": vision.patch_size * vision.spatial_merge_size,
            "clips": {
                f"{detail.number}-{i}": [
                    {
                        "anchor": group.anchor,
                        "frames": [frame._asdict() for frame in group.frames],
                    }
                    for group in media.groups
                ]
                for detail in details
                for i, media in enumerate(detail.media)
                if media.groups
            },
        },
    )
