"""The report of prepare: rejected samples and why, totals, and how full the plan's packs are."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped
from rich.console import Console
from rich.table import Table

from ov2_jax.config.pack import PackConfig
from ov2_jax.data.packing.planning import Lengths, Packs
from ov2_jax.data.packing.vision_rows import propose_vision_rows
from ov2_jax.data.plan.lengths import RecordLengths

_PROPOSE_FROM = 20_000  # records; from a million it would take a minute and a half


# --- contents: plain values, as report.json has them ----------------------------------------------


def count_rejected(
    lines: Iterable[bytes], source_of_file: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Rejected samples by reason and source, the most frequent reason first."""
    found: dict[str, Counter[str]] = {}
    for line in lines:
        entry = json.loads(line)
        source = source_of_file.get(entry["file"], "")
        found.setdefault(entry["reason"], Counter())[source] += 1
    ordered = sorted(found.items(), key=lambda item: (-item[1].total(), item[0]))
    return {reason: dict(sorted(counts.items())) for reason, counts in ordered}


def _patches(table: RecordLengths) -> Int64[np.ndarray, " records"]:
    """Patches of each record."""
    sums = np.concatenate([[0], np.cumsum(table.windows, dtype=np.int64)])
    return np.diff(sums[table.ends], prepend=0)


def record_totals(table: RecordLengths) -> dict[str, int]:
    return {
        "records": len(table.tokens),
        "usable": int((table.tokens > 0).sum()),
        "tokens": int(table.tokens.sum(dtype=np.int64)),
        "patches": int(table.windows.sum(dtype=np.int64)),
        "windows": len(table.windows),
        "dropped_rounds": int((table.dropped_rounds > 0).sum()),  # samples
        "uniform_fallbacks": int(table.uniform_fallbacks.sum()),
    }


def source_totals(
    table: RecordLengths, names: Sequence[str], sizes: Sequence[int]
) -> dict[str, dict[str, int]]:
    """Totals of each source by its name. The sources have `sizes` records, in the table's order."""
    ends = np.cumsum(sizes)
    starts = ends - np.array(sizes)

    def by_source(values: Shaped[np.ndarray, " records"]) -> list[int]:
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return (sums[ends] - sums[starts]).tolist()

    columns = {
        "records": sizes,
        "usable": by_source(table.tokens > 0),
        "tokens": by_source(table.tokens),
        "patches": by_source(_patches(table)),
    }
    found: dict[str, Counter[str]] = {name: Counter() for name in names}
    for i, name in enumerate(names):  # sources may share a name
        found[name].update({column: values[i] for column, values in columns.items()})
    return {name: dict(totals) for name, totals in found.items()}


def plan_totals(
    table: RecordLengths, packs: Packs, epochs: Sequence[int], config: PackConfig
) -> dict[str, Any]:
    """Packs of each epoch, and the share of token and patch slots that they use."""
    tokens = int(table.tokens[packs.members].sum(dtype=np.int64))
    patches = int(_patches(table)[packs.members].sum())
    n = sum(epochs)
    return {
        "packs": list(epochs),
        "samples": len(packs.members),
        "utilisation_tokens": round(tokens / (n * config.token_slots), 4),
        "utilisation_patches": round(patches / max(1, n * config.patch_slots), 4),
    }


def vision_rows(lengths: Lengths, config: PackConfig, *, unit: int) -> dict[str, list[list[int]]]:
    """The configured classes of vision rows, and those proposed for the data.

    Widths of the latter are multiples of `unit`, the merge unit.
    """
    some = some_lengths(lengths)
    proposed = propose_vision_rows(some, config.rows, config.seq_len, unit=unit)
    return {
        "configured": [list(c) for c in config.vision_rows],
        "proposed": [list(c) for c in proposed],
    }


def some_lengths(lengths: Lengths) -> Lengths:
    """Enough records to propose vision rows from: evenly spaced ones, and those with the most
    patches or the largest window."""
    n = len(lengths.tokens)
    if n <= _PROPOSE_FROM:
        return lengths
    counts = np.diff(lengths.ends, prepend=0)
    starts = lengths.ends - counts
    sums = np.concatenate([[0], np.cumsum(lengths.windows, dtype=np.int64)])
    largest = np.zeros(n, np.int32)
    some = counts > 0
    if some.any():
        largest[some] = np.maximum.reduceat(lengths.windows, starts[some])
    chosen = [np.linspace(0, n - 1, _PROPOSE_FROM).astype(np.int64)]
    for size in (sums[lengths.ends] - sums[starts], largest):
        chosen.append(np.argsort(-size, kind="stable")[:500])
    which = np.unique(np.concatenate(chosen))
    windows = [lengths.windows[starts[i] : lengths.ends[i]] for i in which]
    return Lengths(lengths.tokens[which], np.concatenate(windows), np.cumsum(counts[which]))


# --- showing --------------------------------------------------------------------------------------


def _tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, headings, rows) of each table."""
    sources = [
        [name, *(f"{value:,}" for value in row.values())] for name, row in report["sources"].items()
    ]
    reasons = [
        [reason, source, f"{n:,}"]
        for reason, counts in report["rejected"].items()
        for source, n in counts.items()
    ]
    plan, rows = report["plan"], report["vision_rows"]
    packs = [
        ["packs", " + ".join(f"{n:,}" for n in plan["packs"])],
        ["samples", f"{plan['samples']:,}"],
        ["token slots used", f"{plan['utilisation_tokens']:.1%}"],
        ["patch slots used", f"{plan['utilisation_patches']:.1%}"],
        ["pack.vision_rows", _classes(rows["configured"])],
        ["proposed", _classes(rows["proposed"])],
        ["samples that lost rounds", f"{report['dropped_rounds']:,}"],
        ["clips read as uniform frames instead", f"{report['uniform_fallbacks']:,}"],
    ]
    if "packed" in report:
        packs.append(["packed shards", f"{report['packed']['bytes'] / 1e9:.3f} GB"])
    found = [
        ("Data sets", ["name", "records", "usable", "tokens", "patches"], sources),
        ("Rejected", ["reason", "data set", "samples"], reasons),
        ("Plan", ["", ""], packs),
    ]
    return [t for t in found if t[2]]


def _classes(classes: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"({r}, {w})" for r, w in classes) or "none"


def to_markdown(report: Mapping[str, Any]) -> str:
    text = [f"# {report['usable']:,} of {report['records']:,} records can be used", ""]
    for title, headings, rows in _tables(report):
        text += [f"## {title}", "", f"| {' | '.join(headings)} |"]
        text += [f"|{'---|' * len(headings)}"]
        text += [f"| {' | '.join(c.replace('|', '/') for c in row)} |" for row in rows] + [""]
    return "\n".join(text)


def show(report: Mapping[str, Any], console: Console) -> None:
    for title, headings, rows in _tables(report):
        table = Table(title=title, title_justify="left", show_header=any(headings))
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="left" if i == 0 or title == "Plan" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
