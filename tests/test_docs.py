"""What the documentation names exists: links, modules, flags, fields, reasons, parameter counts."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conversion.keys import parameter_count
from ov2_jax.config.experiment import Experiment
from ov2_jax.config.sizes import SIZES, model_config
from ov2_jax.data.rejected import REASONS
from tests.programs import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text() for path in PAGES}
FIELDS = {f.name: f for f in dataclasses.fields(Experiment)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_files_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[page.name]):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`([\w/]+/\w+\.\w+)`", TEXTS[page.name]):
        assert (REPOSITORY / path).exists() or (REPOSITORY / "ov2_jax" / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_modules_and_flags_exist(page):
    for line in re.sub(r"\\\n\s*", "", TEXTS[page.name]).splitlines():
        for module, rest in re.findall(r"python -m ([\w.]+)(.*)", line):
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.submodule_search_locations:  # a package
                spec = importlib.util.find_spec(f"{module}.__main__")
            assert spec is not None, module
            source = Path(spec.origin).read_text()
            # Flags that programs share: --config, and --job of launchers.
            files = ("ov2_jax/core/program.py", "launch/platforms/submit.py")
            shared = "".join((REPOSITORY / path).read_text() for path in files)
            # What follows a lone -- is for another program.
            for flag in re.findall(r"--([\w-]+)", rest.split(" -- ")[0]):
                assert f'"{flag}"' in source + shared or f'"--{flag}"' in source, (module, flag)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_fields_exist(page):
    """`data.lookahead`, --config.optimizer.train=..., and the like."""
    parts = "data|pack|optimizer|compute|mesh|checkpoint"
    named = re.findall(rf"(?:`|--config\.)({parts})\.(\w+)", TEXTS[page.name])
    for part, name in named:
        kind = FIELDS[part].type
        assert name in {f.name for f in dataclasses.fields(kind)}, f"{part}.{name}"
    for name in re.findall(r"--config\.(\w+)=", TEXTS[page.name]):
        assert name in FIELDS, name


def test_every_reason_has_its_row_and_no_other():
    rows = re.findall(r"^\| `(\w+)` \| ", TEXTS["data.md"].split("## Rejected samples\n")[1], re.M)
    assert rows[: len(REASONS)] == list(REASONS)


def test_every_data_option_is_explained():
    options = TEXTS["data.md"]
    for part in ("data", "pack"):
        for field in dataclasses.fields(FIELDS[part].type):
            assert re.search(rf"\b{field.name}\b", options), f"{part}.{field.name}"


def test_parameter_counts():
    for size in SIZES:
        count = f"{parameter_count(model_config(size)):,}".replace(",", " ")
        assert count in TEXTS["design.md"], size


_HINT = re.compile(
    r"\b(?:(?:Float|Int|UInt)\d*|BFloat16|Bool|Shaped|Num|Real|Inexact|Integer|Key)"
    r'\[\s*[\w.]+(?:\[[^\]]*\])?(?:\s*\|\s*[\w.]+)*,\s*((?:"[^"]*"\s*)+)'
)


def dimensions(text: str) -> set[str]:
    """The names in a file's jaxtyping annotations; starred ones and numbers left out."""
    names = " ".join(_HINT.findall(text)).replace('"', "").split()
    return {n.lstrip("_#?") for n in names if re.fullmatch(r"[_#?]*[A-Za-z]\w*", n)}


def test_every_dimension_is_in_the_alphabet():
    """One table for the whole repository; and nothing in the table that no signature has."""
    section = TEXTS["design.md"].split("## Shapes: one alphabet\n")[1].split("\n## ")[0]
    cells = [row.strip("|").split("|") for row in re.findall(r"^\|.*\|$", section, re.M)]
    listed = [name.strip() for row in cells for cell in row[::3] for name in cell.split(",")]
    listed = {n for n in listed if n not in ("letter", "word", "") and "---" not in n}
    used = {
        name
        for package in ("ov2_jax", "conversion", "launch")
        for path in (REPOSITORY / package).rglob("*.py")
        for name in dimensions(path.read_text())
    }
    assert len(used) > 40
    assert used - listed == set()
    assert {n for n in listed - used if len(n) > 1} == set()


def test_the_picture_of_the_packages_is_that_of_the_imports():
    command = [sys.executable, "docs/packages.py", "--check"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
