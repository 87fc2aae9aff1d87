"""Draws docs/packages.svg from the imports: python docs/packages.py [--check]

Each package stands above all that it imports. With --check nothing is written; the status is 1 if
the picture is not that of today's imports, or if an arrow runs back up.
"""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).with_name("packages.svg")

# From the top: (module, what it holds). Programs that are single files count as one package.
PACKAGES = (
    ("launch", "jobs on clusters and pods; the planner"),
    ("ov2_jax.quickstart", "the small job, from files to a Hugging Face folder"),
    ("programs", "ov2_jax/train.py, generate.py, evaluate.py"),
    ("ov2_jax.evaluation", "answers to held-out questions, scored"),
    ("ov2_jax.generation", "decoding with a key/value cache"),
    ("ov2_jax.training", "loss, step, checkpoints, monitoring"),
    ("ov2_jax.data", "from files to packed batches"),
    ("conversion", "Hugging Face and back"),
    ("ov2_jax.model", "encoder, merger, decoder"),
    ("ov2_jax.config", "all that a user can state, checked"),
    ("ov2_jax.sharding", "the mesh, what is cut how, what is exchanged"),
    ("ov2_jax.core", "contracts: the batch, errors, files, programs"),
)
ROOMS = (
    ("prepare", "a corpus validated, measured, planned"),
    ("inspect", "what the model sees, as a page"),
    ("loader", "steps of packs, resumable"),
    ("plan", "the folder that prepare writes"),
    ("encoding", "records to tokens and patches"),
    ("packing", "samples to packs"),
    ("sources", "files of all formats to records"),
    ("rejected", "samples that cannot be used"),
    ("sample", "what encoding gives"),
)
_PROGRAMS = ("ov2_jax.train", "ov2_jax.generate", "ov2_jax.evaluate")

_ROW, _HEIGHT, _WIDTH = 58, 34, 172  # pixels: of a row, and of a box
_TOP = 64


def _owner(module: str, names: list[str], prefix: str) -> str | None:
    """The package of `names` that a module belongs to."""
    if module in _PROGRAMS:
        return "programs" if "programs" in names else None
    found = [n for n in names if module == prefix + n or module.startswith(f"{prefix}{n}.")]
    return found[0] if found else None


def arrows(graph: grimp.ImportGraph, names: list[str], prefix: str = "") -> set[tuple[str, str]]:
    """(importer, imported) between the packages of `names`."""
    found = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            pair = _owner(importer, names, prefix), _owner(imported, names, prefix)
            if None not in pair and pair[0] != pair[1]:
                found.add(pair)
    return found


def _column(
    x: int, title: str, rows: tuple[tuple[str, str], ...], pairs: set[tuple[str, str]]
) -> list[str]:
    """Boxes below each other, their meaning on the right, arrows on the left."""
    at = {name: _TOP + i * _ROW for i, (name, _) in enumerate(rows)}
    out = [f'<text x="{x}" y="36" class="title">{escape(title)}</text>']
    for importer, imported in sorted(pairs, key=lambda p: (at[p[1]] - at[p[0]], p)):
        start, end = at[importer] + _HEIGHT, at[imported]
        if end - start == _ROW - _HEIGHT:
            middle = x + _WIDTH / 2
            out.append(f'<path class="near" d="M{middle} {start} V{end - 2}"/>')
        else:
            bulge = 12 + 0.19 * (end - start)
            y1, y2 = start - _HEIGHT / 2 + 5, end + _HEIGHT / 2 - 5
            curve = f"M{x} {y1} C{x - bulge} {y1}, {x - bulge} {y2}, {x - 2} {y2}"
            out.append(f'<path class="far" d="{curve}"/>')
    for name, meaning in rows:
        y = at[name]
        out += [
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>',
            f'<text x="{x + _WIDTH / 2}" y="{y + 22}" class="name">{escape(name)}</text>',
            f'<text x="{x + _WIDTH + 12}" y="{y + 22}" class="meaning">{escape(meaning)}</text>',
        ]
    return out


_STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2933; }
.title { font-weight: 600; font-size: 17px; }
.name { text-anchor: middle; font-weight: 600; }
.meaning { fill: #52606d; font-size: 13px; }
rect { fill: #e6f0fa; stroke: #2f6690; stroke-width: 1.3; }
path { fill: none; stroke: #7b8794; stroke-width: 1; marker-end: url(#head); }
.near { stroke: #2f6690; stroke-width: 1.8; }
.far { opacity: .6; }
"""


def picture() -> tuple[str, list[str]]:
    """The SVG, and the arrows that run back up."""
    graph = grimp.build_graph("ov2_jax", "conversion", "launch", cache_dir=None)
    columns = []
    back = []
    for x, title, rows, prefix in (
        (150, "Packages: each imports only what is below it", PACKAGES, ""),
        (720, "Rooms of ov2_jax.data", ROOMS, "ov2_jax.data."),
    ):
        names = [name for name, _ in rows]
        pairs = arrows(graph, names, prefix)
        back += [f"{a} -> {b}" for a, b in pairs if names.index(a) > names.index(b)]
        columns += _column(x, title, rows, pairs)
    height = _TOP + len(PACKAGES) * _ROW
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 z" style="fill:#7b8794;stroke:none"/></marker>'
    )
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1180 {height}">',
        f"<style>{_STYLE}</style>",
        f"<defs>{head}</defs>",
        f'<rect width="1180" height="{height}" style="fill:#fff;stroke:none"/>',
        *columns,
        "</svg>",
    ]
    return "\n".join(svg) + "\n", back


def main() -> None:
    sys.path.insert(0, str(ROOT))
    svg, back = picture()
    if back:
        sys.exit(f"These imports run back up: {', '.join(back)}")
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(svg)
    elif PICTURE.read_text() != svg:
        sys.exit(f"{PICTURE} is not that of today's imports; run python docs/packages.py.")


if __name__ == "__main__":
    main()
