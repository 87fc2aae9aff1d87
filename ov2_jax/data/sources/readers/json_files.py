"""JSONL files by line and JSON lists by element, through an index of byte offsets."""

import json

import numpy as np
from jaxtyping import Int64

from ov2_jax.core.errors import DataError
from ov2_jax.core.files import open_binary


def _jsonl_index(file: str) -> Int64[np.ndarray, "records 3"]:
    """Start byte, end byte and line number of every line that is not blank."""
    index, start = [], 0
    with open_binary(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                index.append((start, start + len(line), number))
            start += len(line)
    return np.array(index, np.int64).reshape(-1, 3)


def _json_index(file: str) -> Int64[np.ndarray, "records 3"]:
    """The same for the elements of one JSON list. Raises DataError if the list is broken, as the
    elements behind the break cannot be found."""
    try:
        with open_binary(file) as opened:
            text = opened.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}.") from error
    decoder = json.JSONDecoder()
    index, at, byte, line, seen = [], 0, 0, 1, 0

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    def expect(at: int, marks: str) -> str:
        if at >= len(text) or text[at] not in marks:
            found = repr(text[at]) if at < len(text) else "the end of the file"
            raise DataError(
                f"{file} must hold one JSON list of samples: expected one of {marks!r} at line "
                f"{text.count(chr(10), 0, at) + 1}, found {found}. One sample a line (.jsonl) "
                "survives a broken sample."
            )
        return text[at]

    at = skip(1 if text.startswith("\ufeff") else 0)
    expect(at, "[")
    at = skip(at + 1)
    if expect(at, "]{") == "]":
        return np.zeros((0, 3), np.int64)
    while True:
        expect(at, "{")
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file} is broken JSON: {error}. One sample a line (.jsonl) survives a broken "
                "sample."
            ) from error
        # Characters are counted as bytes piece by piece, as reading seeks to bytes.
        byte += len(text[seen:at].encode())
        line += text.count("\n", seen, at)
        size = len(text[at:end].encode())
        index.append((byte, byte + size, line))
        byte, line, seen = byte + size, line + text.count("\n", at, end), end
        at = skip(end)
        if expect(at, ",]") == "]":
            return np.array(index, np.int64)
        at = skip(at + 1)


class JsonReader:
    """Holds only byte offsets and line numbers, 24 bytes a sample."""

    def __init__(self, file: str, *, lines: bool) -> None:
        self._file = file
        self._index = _jsonl_index(file) if lines else _json_index(file)

    def __len__(self) -> int:
        return len(self._index)

    def line(self, index: int) -> int:
        return int(self._index[index, 2])

    def read(self, index: int) -> bytes:
        start, end = self._index[index, :2].tolist()
        # Opened on every call: neither threads nor processes could share an open file.
        with open_binary(self._file) as file:
            file.seek(start)
            return file.read(end - start)
