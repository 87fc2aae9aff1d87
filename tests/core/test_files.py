"""Local and remote files behind one interface, and files that are written whole."""

import os

import pytest

from ov2_jax.core.errors import ConfigError
from ov2_jax.core.files import (
    expand,
    is_file,
    open_binary,
    parent,
    read_json,
    size,
    to_path,
    write_file,
    write_json,
    writing,
)
from tests.data.files import fill_bucket

NAMES = ("a/1.x", "a/2.x", "a/3.y", "b/1.x", "b/c/1.x")


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    if request.param == "remote":
        fill_bucket({f"bucket/data/{name}": name.encode() for name in NAMES})
        return "s3://bucket/data"
    for name in NAMES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/*", ["a/1.x", "a/2.x", "a/3.y"]),
        ("a/*.x", ["a/1.x", "a/2.x"]),
        ("*/1.?", ["a/1.x", "b/1.x"]),
        ("a/[23]*", ["a/2.x", "a/3.y"]),
        ("a/[!1].x", ["a/2.x"]),
        ("[ab]/1.x", ["a/1.x", "b/1.x"]),
        ("*.x", []),
        ("c/none.x", ["c/none.x"]),
    ],
)
def test_patterns(folder, pattern, names):
    assert expand(f"{folder}/{pattern}") == [f"{folder}/{name}" for name in names]


def test_a_local_pattern_gives_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.x").touch()
    assert expand("*.x") == [str(tmp_path / "a.x")] and expand("a.x") == ["a.x"]


def test_reading(folder):
    with open_binary(f"{folder}/a/1.x") as file:
        file.seek(2)
        assert file.read() == b"1.x"
    assert parent(f"{folder}/a/1.x") == f"{folder}/a"
    assert is_file(f"{folder}/a/1.x")
    assert not is_file(f"{folder}/a") and not is_file(f"{folder}/none")
    assert size(f"{folder}/a/1.x") == 5 and size(f"{folder}/b") == 5 + 7


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert not is_file(tmp_path / "pipe")


def test_other_schemes_are_refused():
    for path in ("http://host/a", "memory://a", "file:///a"):
        with pytest.raises(ConfigError, match=f"scheme {path.split(':')[0]}://, which is not supp"):
            to_path(path)
    with pytest.raises(ConfigError, match=r"which only local paths can have"):
        expand("s3://bucket/**/a.x")


def test_files_are_written_whole_or_not_at_all(folder):
    path = to_path(folder) / "a/1.x"
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError), writing(path) as part:
        part.write_bytes(b"half")
        assert part.parent == path.parent and part.exists()
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError), writing(path):
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"new"
    assert sorted(p.name for p in path.parent.iterdir()) == ["1.x", "2.x", "3.y"]


def test_json(folder):
    path = f"{folder}/a.json"
    write_json(path, {"ä": [1]})
    assert read_json(path) == {"ä": [1]}
    assert to_path(path).read_bytes().decode() == '{\n "ä": [\n  1\n ]\n}\n'
