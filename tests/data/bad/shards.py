"""Files of samples that are damaged as files: tar, Parquet, ArrayRecord, JSONL."""

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from tests.data.bad.cases import OK, Case, cut, flip, line, sample
from tests.data.bad.pictures import encoded

_ROWS = 8
_ANY = ("bad_shard", "bad_record", "bad_json", "bad_image", "missing_file", "bad_turns", OK)
_ANY += ("unknown_role", "empty_answer", "placeholder_mismatch", "path_outside_root")


def _picture() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def tar(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _header(data: bytes, number: int, **fields: bytes) -> bytes:
    """The tar with fields of a member's header replaced, and a right checksum."""
    places = {"size": (124, 12), "type": (156, 1), "name": (0, 100)}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        at = archive.getmembers()[number].offset
    header = bytearray(data[at : at + 512])
    for name, value in fields.items():
        start, size = places[name]
        header[start : start + size] = value.ljust(size, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def _tars() -> dict[str, tuple[bytes, dict[str, Any]]]:
    picture = _picture()
    whole = tar(
        [
            (f"{i}.{s}", picture if s == "png" else b"A")
            for i in range(_ROWS)
            for s in ("png", "txt")
        ]
    )
    good = [OK] * 3  # the fourth sample's first member is damaged in what follows
    ends = {"rows": [*good[:2], "bad_shard"]}
    text = line(sample("<image>?"))
    negative = b"\xff" * 12  # a size of -1
    outside = tar(
        [
            ("../../etc/a.png", picture),
            ("../../etc/a.txt", b"A"),
            ("/b.png", picture),
            ("/b.txt", b"A"),
        ]
    )
    files: dict[str, tuple[bytes, dict[str, Any]]] = {
        "empty": (b"", {"rows": ["bad_shard"]}),
        "zeros": (bytes(10240), {"rows": []}),
        "text": (b"no tar\n" * 500, {"rows": ["bad_shard"]}),
        "outside": (outside, {"rows": [OK, OK]}),
        "names another": (
            tar([("a.json", line(sample("<image>?", image="../../x.png"))), ("a.png", picture)]),
            {"rows": [OK]},
        ),
        "negative size": (_header(whole, 6, size=negative), ends),
        "huge size": (_header(whole, 6, size=b"\x80" + b"\xff" * 11), ends),
        "size in words": (_header(whole, 6, size=b"big"), ends),
        "a folder": (_header(whole, 6, type=b"5"), ends),
        "a link": (_header(whole, 6, type=b"2"), ends),
        "a pax header": (_header(whole, 6, type=b"x"), {"has": [OK]}),
        "a long name": (_header(whole, 6, type=b"L"), {"has": [OK]}),
        "sparse": (_header(whole, 6, type=b"S"), {"has": [OK]}),
        "a name of bytes": (_header(whole, 6, name=b"\xff\xfe.png"), {"has": [OK]}),
        "no name": (_header(whole, 6, name=b""), {"has": [OK]}),
        "same key twice": (
            tar([("a.txt", b"A"), ("a.png", picture), ("a.png", picture)]),
            {"rows": [OK]},
        ),
        "json of junk": (
            tar([("a.json", b"{"), ("b.json", b"\xff"), ("c.json", b"[" * 50_000)]),
            {"rows": ["bad_json"] * 3},
        ),
        "json of types": (
            tar([(f"{i}.json", v) for i, v in enumerate((b"5", b"null", b"[]", b"{}", b'"a"'))]),
            {"rows": ["bad_record"] * 5},
        ),
        "too few members": (tar([("a.json", text)]), {"rows": ["placeholder_mismatch"]}),
        "packed": (
            tar(
                [
                    ("ps_0.json", b'{"captions": [1, 2], "prompts": 5}'),
                    ("ps_1.json", b"[]"),
                    ("ps_2.json", b"{"),
                ]
            ),
            {"rows": ["bad_record", "bad_record", "bad_record", "bad_json"]},
        ),
        "packed lies": (
            tar(
                [
                    (
                        "ps_0.json",
                        json.dumps(
                            {"captions": [["A"]], "prompts": [["Q"]], "images": [["a", "b"]]}
                        ).encode(),
                    )
                ]
            ),
            {"rows": ["missing_file"]},
        ),
    }
    for percent in (3, 20, 45, 70, 80):
        files[f"cut{percent}"] = cut(whole, percent / 100), {"has": ["bad_shard"]}
    for seed in range(10):
        files[f"flip{seed}"] = flip(whole, seed, bits=6), {}
    return {f"{name}.tar": file for name, file in files.items()}


def _table(rows: int) -> pa.Table:
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A"}]
    picture = {"bytes": _picture(), "path": "a.png"}
    columns = {
        "id": [str(i) for i in range(rows)],
        "messages": [turns] * rows,
        "images": [[picture]] * rows,
    }
    return pa.table(columns)


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=2, compression="snappy", **options)
    return out.getvalue()


def _parquets() -> dict[str, tuple[bytes, dict[str, Any]]]:
    plain = parquet(_table(_ROWS), use_dictionary=False)
    checked = parquet(
        _table(_ROWS), use_dictionary=False, write_page_checksum=True, write_statistics=False
    )
    with pq.ParquetFile(io.BytesIO(plain)) as opened:
        column = opened.metadata.row_group(1).column(3)
        at, size = column.data_page_offset, column.total_compressed_size
    broken = plain[:at] + b"\xff" * size + plain[at + size :]
    one = [OK, OK, "bad_shard", "bad_shard", OK, OK, OK, OK]
    footer = len(plain) - struct.unpack("<I", plain[-8:-4])[0] - 8
    wrong = pa.table({"messages": [5, 6], "images": [None, None]})
    files: dict[str, tuple[bytes, dict[str, Any]]] = {
        "empty": (b"", {"rows": ["bad_shard"]}),
        "text": (b"no parquet\n" * 50, {"rows": ["bad_shard"]}),
        "marks alone": (b"PAR1PAR1", {"rows": ["bad_shard"]}),
        "no rows": (parquet(_table(_ROWS).slice(0, 0)), {"rows": []}),
        "a column chunk": (broken, {"rows": one}),
        "no footer": (
            plain[:footer] + bytes(len(plain) - footer - 4) + b"PAR1",
            {"rows": ["bad_shard"]},
        ),
        "footer size": (plain[:-8] + b"\xff\xff\xff\x7fPAR1", {"rows": ["bad_shard"]}),
        "other types": (parquet(wrong), {"rows": ["bad_record"] * 2}),
        "other columns": (parquet(pa.table({"a": [1]})), {"stops": "no known layout"}),
        "not UTF-8": (
            parquet(
                pa.table({"image": [None], "caption": pa.array([b"\xff\xfe"]).view(pa.string())})
            ),
            {"has": ["bad_record"]},
        ),
    }
    for percent in (2, 30, 70, 98):
        files[f"cut{percent}"] = cut(plain, percent / 100), {"rows": ["bad_shard"]}
    for seed in range(10):
        files[f"flip{seed}"] = flip(plain, seed, 0.05, footer / len(plain), bits=3), {}
        files[f"checked flip{seed}"] = (
            flip(checked, seed, 0.05, 0.7, bits=3),
            {"has": ["bad_shard"]},
        )
        files[f"footer flip{seed}"] = flip(plain, seed, footer / len(plain), bits=3), {}
    return {f"{name}.parquet": file for name, file in files.items()}


def array_record(path: Path, records: list[bytes], options: str = "group_size:1") -> bytes:
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    data = path.read_bytes()
    path.unlink()
    return data


def _array_records(folder: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    rows = [line({**sample("Q " + "w" * 50 * i), "id": str(i)}) for i in range(_ROWS)]
    whole = array_record(folder / "whole", rows)
    junk = [rows[0], b"", b"{", b"null", b"\xff", rows[1]]
    wants = [OK, "bad_json", "bad_json", "bad_record", "bad_json", OK]
    files: dict[str, tuple[bytes, dict[str, Any]]] = {
        "empty": (b"", {"rows": ["bad_shard"]}),
        "text": (b"no records\n" * 50, {"rows": ["bad_shard"]}),
        "zeros": (bytes(1 << 17), {"rows": ["bad_shard"]}),
        "records of junk": (array_record(folder / "junk", junk), {"rows": wants}),
    }
    for percent in (1, 30, 70, 98):
        files[f"cut{percent}"] = cut(whole, percent / 100), {"rows": ["bad_shard"]}
    for seed in range(12):
        files[f"flip{seed}"] = flip(whole, seed, 0, 0.02 if seed % 2 else 1, bits=6), {}
    return {f"{name}.array_record": file for name, file in files.items()}


def _lines() -> dict[str, tuple[bytes, dict[str, Any]]]:
    rows = [line({**sample("Q"), "id": str(i)}) for i in range(_ROWS)]
    whole = b"\n".join(rows) + b"\n"
    as_list = b"[" + b",".join(rows) + b"]"
    all_good = {"rows": [OK] * _ROWS}
    return {
        "no end.jsonl": (whole[:-1], all_good),
        "windows.jsonl": (whole.replace(b"\n", b"\r\n"), all_good),
        "blank lines.jsonl": (whole.replace(b"\n", b"\n \n\n"), all_good),
        "mark.jsonl": (b"\xef\xbb\xbf" + whole, all_good),
        "cut30.jsonl": (cut(whole, 0.3), {"rows": [OK, OK, "bad_json"]}),
        "cut80.jsonl": (cut(whole, 0.8), {"rows": [OK] * 6 + ["bad_json"]}),
        "junk.jsonl": (np.random.default_rng(0).bytes(3000), {}),
        "utf-16.jsonl": (whole.decode().encode("utf-16"), {}),
        "zeros.jsonl": (bytes(3000), {"rows": ["bad_json"]}),
        "list.jsonl": (as_list, {"rows": ["bad_record"]}),
        **{f"flip{seed}.jsonl": (flip(whole, seed, bits=4), {"has": [OK]}) for seed in range(6)},
        "whole.json": (as_list, all_good),
        "cut.json": (cut(as_list, 0.55), {"stops": "broken JSON"}),
        "no end.json": (as_list[:-1], {"stops": "must hold one JSON list"}),
        "object.json": (rows[0], {"stops": "must hold one JSON list"}),
        "bytes.json": (b"\xff\xfe" + as_list, {"stops": "not UTF-8"}),
        "deep.json": (b"[" + b'{"a":' * 60_000, {"stops": "broken JSON"}),
        "nothing.json": (b"", {"stops": "must hold one JSON list"}),
        "empty.json": (b"[]", {"stops": "no sample"}),
    }


def shard_cases(folder: Path) -> list[Case]:
    """The files' bytes; `facts` has the exact rows, those that must be there, or why it stops."""
    files = {**_tars(), **_parquets(), **_array_records(folder), **_lines()}
    return [
        Case(f"shard {name}", _ANY, file=data, facts=facts, video=name)
        for name, (data, facts) in files.items()
    ]
