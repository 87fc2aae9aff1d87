"""Files that may be local or remote, and writing them whole."""

import json
import uuid
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from etils import epath


def is_remote(path: str) -> bool:
    return "://" in path


def open_binary(path: str) -> BinaryIO:
    """A readable file that can be sought in."""
    return fsspec.open(path, "rb").open() if is_remote(path) else Path(path).open("rb")


def is_file(path: str) -> bool:
    if not is_remote(path):
        return Path(path).is_file()
    files, inner = fsspec.core.url_to_fs(path)
    return files.isfile(inner)


def expand(path: str) -> list[str]:
    """The files that a pattern with `*`, `?` or `[` stands for, sorted; other paths as they are."""
    if not any(mark in path for mark in "*?["):
        return [path]
    files, inner = fsspec.core.url_to_fs(path)
    found = sorted(files.glob(inner))
    return [files.unstrip_protocol(f) for f in found] if is_remote(path) else found


def parent(path: str) -> str:
    """The folder of a file, local or remote."""
    return path.rpartition("/")[0] if is_remote(path) else str(Path(path).parent)


def part_of(path: epath.Path) -> epath.Path:
    """Where a file is written until it is whole. Two writers of one file do not meet."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def write_file(path: epath.Path, data: bytes) -> None:
    """Atomically."""
    part = part_of(path)
    part.write_bytes(data)
    part.replace(path)


def write_json(path: epath.Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: epath.Path) -> Any:
    return json.loads(path.read_bytes())
