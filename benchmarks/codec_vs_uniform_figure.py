"""The results of codec_vs_uniform.py as a table and as a figure."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.codec_vs_uniform_clips import CHANCE, TASKS
from benchmarks.codec_vs_uniform_input import BenchmarkError

INPUTS = ("codec", "uniform")


class Point(NamedTuple):
    """Of all seeds of one input and budget."""

    mean: float
    low: float
    high: float


def points(results: list[dict], video: str, task: str) -> dict[int, Point]:
    found: dict[int, list[float]] = {}
    for r in results:
        if r["input"] == video:
            found.setdefault(r["budget"], []).append(r["accuracy"][task])
    return {b: Point(float(np.mean(v)), min(v), max(v)) for b, v in sorted(found.items())}


def table(results: list[dict]) -> str:
    """Markdown: means over seeds, and their range if it is not 0."""

    def cell(point: Point) -> str:
        if round(point.high - point.low, 2) == 0:
            return f"{point.mean:.2f}"
        return f"{point.mean:.2f} ({point.low:.2f} to {point.high:.2f})"

    columns = {(v, t): points(results, v, t) for v in INPUTS for t in TASKS}
    shown = {(r["input"], r["budget"]): r["shown"] for r in results}
    lines = [
        "| vision tokens | "
        + " | ".join(f"{v}: event shown | {v}: what | {v}: when" for v in INPUTS)
        + " |",
        "|" + "---|" * (1 + 3 * len(INPUTS)),
    ]
    for budget in sorted({r["budget"] for r in results}):
        cells = [str(budget)]
        for video in INPUTS:
            cells.append(f"{shown[video, budget]:.2f}")
            cells += [cell(columns[video, task][budget]) for task in TASKS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: list[dict], png: Path) -> None:
    """One panel a question: mean and range over seeds, chance, and the limit of uniform frames.

    Raises BenchmarkError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BenchmarkError(
            "The figure needs matplotlib: pip install 'ov2_jax[dev]', or leave --png out."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"codec": "#0b6e4f", "uniform": "#c1440e"}
    titles = {"what": "What appeared? (colour)", "when": "When? (second)"}
    grey = "#777777"
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for panel, task in zip(panels, TASKS, strict=True):
        for video in INPUTS:
            curve = points(results, video, task)
            budgets, line = list(curve), list(curve.values())
            style = {"color": colours[video]}
            panel.fill_between(
                budgets, [p.low for p in line], [p.high for p in line], alpha=0.2, lw=0, **style
            )
            panel.plot(budgets, [p.mean for p in line], marker="o", lw=2, clip_on=False, **style)
            high = video == "codec"
            at = (len(budgets) - 1) // 2 if high else 0
            panel.annotate(
                "codec-style" if high else "uniform frames",
                (budgets[at], line[at].mean),
                xytext=(0, -18) if high else (-4, 36),
                textcoords="offset points",
                ha="center" if high else "left",
                weight="bold",
                **style,
            )
        seen = {r["budget"]: r["shown"] for r in results if r["input"] == "uniform"}
        best = [s + (1 - s) * CHANCE[task] for _, s in sorted(seen.items())]
        panel.plot(sorted(seen), best, color=colours["uniform"], lw=1, ls=":")
        panel.axhline(CHANCE[task], color=grey, lw=1, ls="--")
        panel.annotate(
            "chance",
            (max(seen), CHANCE[task]),
            xytext=(0, -11),
            textcoords="offset points",
            ha="right",
            color=grey,
            size=9,
        )
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(seen), [str(b) for b in sorted(seen)], minor=False)
        panel.set(title=titles[task], xlabel="vision tokens a clip", ylim=(0, 1.03))
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e5e5e5")
        panel.set_axisbelow(True)
    panels[0].set_ylabel("exact match, held-out clips")
    part = png.with_name(png.name + ".part")
    png.parent.mkdir(parents=True, exist_ok=True)
    # Without matplotlib's version in it, the same results give the same file.
    figure.savefig(part, dpi=140, format="png", metadata={"Software": None})
    pyplot.close(figure)
    part.replace(png)
