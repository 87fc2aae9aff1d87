"""What prepare found: who was set aside and why, totals, and how full the plan's packs are."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ov2_jax.config.pack import PackConfig
from ov2_jax.data.packing.planning import Lengths, Packs
from ov2_jax.data.packing.vision_rows import propose_vision_rows
from ov2_jax.data.plan.folder import Arrays
from ov2_jax.data.plan.lengths import count_by_source, usable_lengths

_PROPOSE_FROM = 20_000  # records; from a million it would take a minute and a half


def set_aside(
    lines: Iterable[bytes], source_of_file: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Samples by reason and source, the most frequent reason first."""
    found: dict[str, Counter[str]] = {}
    for line in lines:
        entry = json.loads(line)
        source = source_of_file.get(entry["file"], "")
        found.setdefault(entry["reason"], Counter())[source] += 1
    ordered = sorted(found.items(), key=lambda item: (-item[1].total(), item[0]))
    return {reason: dict(sorted(counts.items())) for reason, counts in ordered}


def make_report(
    table: Arrays,
    packs: Packs,
    epochs: Sequence[int],
    config: PackConfig,
    merge_unit: int,
    names: Sequence[str],
    sizes: Sequence[int],
    rejects: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Plain values; `epochs` are packs by epoch. `names` and `sizes` are the sources'."""
    tokens = np.asarray(table["tokens"])
    sums = np.concatenate([[0], np.cumsum(table["windows"], dtype=np.int64)])
    ends = np.asarray(table["ends"])
    patches = np.diff(sums[ends], prepend=0)
    used = int(tokens[packs.members].sum(dtype=np.int64))
    used_patches = int(patches[packs.members].sum())
    n = sum(epochs)
    lengths = some_lengths(usable_lengths(table)[0])
    proposed = propose_vision_rows(lengths, config.rows, config.seq_len, unit=merge_unit)
    by_source = {
        name: dict(zip(("records", "usable", "tokens", "patches"), row, strict=True))
        for name, *row in zip(
            names,
            sizes,
            count_by_source(tokens > 0, sizes),
            count_by_source(tokens, sizes),
            count_by_source(patches, sizes),
            strict=True,
        )
    }
    return {
        "records": len(tokens),
        "usable": int((tokens > 0).sum()),
        "tokens": int(tokens.sum(dtype=np.int64)),
        "patches": int(patches.sum()),
        "windows": len(table["windows"]),
        "truncated": int((np.asarray(table["dropped"]) > 0).sum()),
        "uniform_fallbacks": int(np.asarray(table["fallbacks"]).sum()),
        "sources": by_source,
        "set_aside": rejects,
        "plan": {
            "packs": list(epochs),
            "samples": len(packs.members),
            "utilisation_tokens": round(used / (n * config.token_slots), 4),
            "utilisation_patches": round(used_patches / max(1, n * config.patch_slots), 4),
        },
        "vision_rows": {
            "configured": [list(c) for c in config.vision_rows],
            "proposed": [list(c) for c in proposed],
        },
    }


def some_lengths(lengths: Lengths) -> Lengths:
    """Enough records to propose vision rows from: evenly spaced ones, and those with most patches
    or the largest window."""
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


def _tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, headings, rows) of each table."""
    sources = [
        [name, *(f"{value:,}" for value in row.values())] for name, row in report["sources"].items()
    ]
    reasons = [
        [reason, source, f"{n:,}"]
        for reason, counts in report["set_aside"].items()
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
        ["samples that lost rounds", f"{report['truncated']:,}"],
        ["clips read as uniform frames instead", f"{report['uniform_fallbacks']:,}"],
    ]
    if "packed" in report:
        packs.append(["packed shards", f"{report['packed']['bytes'] / 1e9:.3f} GB"])
    found = [
        ("Data sets", ["name", "records", "usable", "tokens", "patches"], sources),
        ("Set aside", ["reason", "data set", "samples"], reasons),
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
