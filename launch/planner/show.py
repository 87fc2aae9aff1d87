"""A plan on the terminal, as JSON and as a page."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe
from rich.console import Console
from rich.table import Table

from launch.planner.chips import GIB
from ov2_jax.core.files import write_file

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "page"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=True,
)


def gib(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 100 else f"{n / 2**20:.2f} MiB"


def tera(n: float) -> str:
    return f"{n / 1e12:,.1f} T" if n >= 1e12 else f"{n / 1e9:.1f} G"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.2f} ms"


def amount(value: float) -> str:
    """Numbers from 100 as integers, smaller ones with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mesh_text(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one chip"


def outcome(row: Mapping[str, Any]) -> str:
    """A candidate of a search in a few words."""
    if row["error"]:
        return row["error"]
    fit = "fits" if row["fits"] else "does not fit"
    return f"{fit}, {row['gib']:.1f} GiB, at least {seconds(row['step_seconds'])} a step"


for _filter in (gib, tera, times, seconds, amount, mesh_text, outcome):
    _TEMPLATES.filters[_filter.__name__] = _filter


def verdict(plan: Mapping[str, Any]) -> str:
    memory = plan["memory"]
    word = "fits" if memory["fits"] else "does not fit"
    text = f"{word}: buffers {gib(memory['buffers'])} of the {gib(memory['usable'])} that a program"
    if memory["total"] > memory["buffers"]:
        return f"{text} may use, {gib(memory['total'])} with everything reserved"
    return f"{text} may use"


def _table(console: Console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def print_plan(plan: Mapping[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=False)
    memory, flops, ratios = plan["memory"], plan["flops"], plan["ratios"]
    head = f"{plan['title']} on {plan['topology']} ({plan['chips']} chips; "
    head += f"{mesh_text(plan['mesh'])}; remat {plan['remat']})"
    console.print(f"[bold]{head}[/]")
    style = "green" if memory["fits"] else "red"
    console.print(f"[bold {style}]{verdict(plan)}[/]")
    if memory["reason"]:
        console.print(f"The compiler: {memory['reason']}")
    console.print(f"compiled in {seconds(plan['compile_seconds'])}, libtpu {plan['libtpu']}\n")
    kinds = [[name, gib(n)] for name, n in memory["kinds"].items() if n]
    kinds.append(["arguments", gib(memory["arguments"])])
    kinds.append(["temporaries", gib(memory["temporaries"])])
    _table(console, "HBM of a chip", ["", ""], kinds)
    model = plan["model_flops"]
    rows = [[name, tera(n)] for name, n in model.items()]
    rows += [[f"compiled matmuls, {name}", tera(n * plan["chips"])] for name, n in _phases(flops)]
    _table(console, "FLOPs of a step, all chips", ["", ""], rows)
    rows = [
        ["matmuls over all slots", *_pair(ratios["matmuls"], tera)],
        ["attention", *_pair(ratios["attention"], tera)],
        ["bytes of weights and gradients a chip sends", *_pair(ratios["weights"], gib)],
    ]
    _table(console, "Done against needed", ["", "done", "needed", "ratio"], rows)
    rows = [
        [part, row["kind"], row["axes"], gib(row["bytes"])]
        for part, found in plan["collectives"]["parts"].items()
        for row in found
        if row["bytes"] > 1e6
    ]
    columns = ["collectives, a chip and step", "kind", "axes", "sent"]
    _table(console, "", columns, rows)
    _table(
        console,
        "A step takes at least",
        ["", ""],
        [[name, seconds(value)] for name, value in plan["bounds"].items()],
    )
    ceiling = plan["mfu_ceiling"]
    console.print(
        f"MFU at most {ceiling:.1%} if everything overlaps, "
        f"{plan['mfu_without_overlap']:.1%} if nothing does\n"
    )
    rows = [
        [
            f"{row['mfu']:.1%} MFU" + (" (ceiling)" if row.get("ceiling") else ""),
            seconds(row["step_seconds"]),
            *(amount(row[f"{what}_per_second"]) for what in ("tokens", "patches", "clips")),
            f"{row['days']:.1f}",
        ]
        for row in plan["throughput"]
    ]
    columns = ["at", "a step", "tokens/s", "patches/s", "clips/s", "days"]
    _table(console, f"The recipe's {plan['work']['steps']:,} steps", columns, rows)
    if plan["search"]:
        rows = [[mesh_text(r["mesh"]), r["remat"], outcome(r)] for r in plan["search"]]
        _table(console, "Searched, best first", ["mesh", "remat", ""], rows)
    for line in [*plan["assumptions"], *plan["notes"]]:
        console.print(f"- {line}")


def _phases(flops: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [*flops["phases"].items(), ("all", flops["matmuls"])]


def _pair(ratio: Mapping[str, Any], form: Any) -> list[str]:
    return [form(ratio["done"]), form(ratio["needed"]), times(ratio["ratio"])]


def html(plan: Mapping[str, Any]) -> str:
    css = (pathlib.Path(__file__).parent / "page" / "plan.css").read_text()
    return _TEMPLATES.get_template("plan.html").render(
        plan=plan, css=markupsafe.Markup(css), verdict=verdict(plan), gibi=GIB
    )


def write(plan: Mapping[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes plan.json and plan.html, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (("plan.json", json.dumps(plan, indent=1)), ("plan.html", html(plan))):
        write_file(folder / name, text.encode())
        written.append(folder / name)
    return written
