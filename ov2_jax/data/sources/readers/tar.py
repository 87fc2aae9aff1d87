"""WebDataset tars: the members of a name up to its first dot are one sample.

Plain samples have a `json` member in a known layout (or a list of messages), or a `txt` caption,
and members with its pictures and clips. A packed Energon sample (key `ps_...`) holds many samples:
its json has `images`, `prompts` and `captions` by sample, and the members are `img{i}_{j}.jpg` and
`.npy`, or `img{i}.jpg`; each becomes a sample of its own. The tar must not be compressed, because
reading seeks to members. Member names are names, never paths that are opened.
"""

import json
import tarfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ov2_jax.core.errors import DataError
from ov2_jax.core.files import open_binary
from ov2_jax.data.rejected import SampleError, bad_record
from ov2_jax.data.sources.media import Embedded

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_VIDEOS = ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg")
_PACKED = "ps_"


class _Member(NamedTuple):
    part: str  # the name after the key: `json`, `img0_1.jpg`
    start: int
    size: int


class _Sample(NamedTuple):
    """Members of one key; `number` is the place in a packed sample, None in a plain one."""

    key: str
    members: tuple[_Member, ...]
    number: int | None


def _key(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, part = base.partition(".")
    return folder + slash + stem, part


class TarReader:
    """Reads all headers once, and the json members of packed samples, which have their number.

    A tar that ends early gives the samples before its end, and one row that cannot be read.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._broken = ""
        groups: list[tuple[str, list[_Member]]] = []
        with open_binary(file) as opened:
            try:
                size = opened.seek(0, 2)
                opened.seek(0)
                with tarfile.open(fileobj=opened, mode="r:") as tar:
                    for info in tar:
                        if info.size < 0:  # would lead back, forever
                            raise tarfile.ReadError(f"{info.name} has the size {info.size}")
                        if not info.isreg():
                            continue
                        if info.issparse():
                            raise tarfile.ReadError(
                                f"{info.name} is stored as a sparse file; write it whole"
                            )
                        if info.offset_data + info.size > size:
                            raise tarfile.ReadError(f"{info.name} ends after the file's end")
                        key, part = _key(info.name)
                        if not groups or groups[-1][0] != key:
                            groups.append((key, []))
                        groups[-1][1].append(_Member(part, info.offset_data, info.size))
                    # tarfile takes a damaged header after the first for the archive's end.
                    opened.seek(tar.offset)
                    if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                        raise tarfile.ReadError(f"no header and no end mark at byte {tar.offset}")
            except (tarfile.TarError, EOFError) as error:
                opened.seek(0)
                if opened.read(2) == b"\x1f\x8b":
                    raise DataError(
                        f"{file} is a compressed tar, in which reading cannot seek; decompress it "
                        "to a plain .tar."
                    ) from error
                self._broken = str(error)
                # The last sample may lack members.
                groups = groups[:-1]
            numbers = [self._numbers(opened, key, members) for key, members in groups]
        # As arrays, since millions of objects would not fit into every worker process.
        members = [member for _, of_key in groups for member in of_key]
        self._keys = [key for key, _ in groups]
        self._ends = np.cumsum([len(of_key) for _, of_key in groups], dtype=np.int64)
        self._parts = sorted({member.part for member in members})
        codes = {part: code for code, part in enumerate(self._parts)}
        self._members = np.array(
            [(codes[m.part], m.start, m.size) for m in members], np.int64
        ).reshape(-1, 3)
        self._samples = np.array(
            [(k, -1 if n is None else n) for k, of_key in enumerate(numbers) for n in of_key],
            np.int64,
        ).reshape(-1, 2)

    def _sample(self, index: int) -> _Sample:
        key, number = self._samples[index].tolist()
        start = int(self._ends[key - 1]) if key else 0
        rows = self._members[start : int(self._ends[key])].tolist()
        members = tuple(_Member(self._parts[code], *place) for code, *place in rows)
        return _Sample(self._keys[key], members, None if number < 0 else number)

    def _numbers(self, opened: Any, key: str, members: list[_Member]) -> list[int] | list[None]:
        """The numbers of the samples in a packed sample; [None] for a plain or unreadable one."""
        text = next((m for m in members if m.part == "json"), None)
        if not key.rpartition("/")[2].startswith(_PACKED) or text is None:
            return [None]
        opened.seek(text.start)
        try:
            packed = json.loads(opened.read(text.size))
        except (ValueError, RecursionError):
            return [None]
        captions = packed.get("captions") if isinstance(packed, Mapping) else None
        return list(range(len(captions))) if isinstance(captions, list) and captions else [None]

    def __len__(self) -> int:
        return len(self._samples) + bool(self._broken)

    def line(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> Mapping[str, Any]:
        if index == len(self._samples):
            raise SampleError("bad_shard", f"the tar is damaged: {self._broken}")
        sample = self._sample(index)
        with open_binary(self._file) as opened:

            def data(member: _Member) -> bytes:
                opened.seek(member.start)
                content = opened.read(member.size)
                if len(content) < member.size:
                    raise SampleError("bad_shard", f"{sample.key}.{member.part} ends early")
                return content

            members = {m.part.lower(): m for m in sample.members}
            row = None
            if "json" in members:
                try:
                    row = json.loads(data(members["json"]))
                except (ValueError, RecursionError) as error:
                    raise SampleError("bad_json", f"{sample.key}.json: {error}") from error

            def embedded(name: str) -> Embedded:
                if name not in members:
                    raise SampleError("missing_file", f"{sample.key} has no member {name}")
                return Embedded(data(members[name]), f"{sample.key}.{name}")

            if sample.key.rpartition("/")[2].startswith(_PACKED):
                return _packed(row, sample, members, embedded)
            if row is None and "txt" in members:
                try:
                    row = {"caption": data(members["txt"]).decode()}
                except UnicodeDecodeError as error:
                    raise bad_record(f"{sample.key}.txt is not UTF-8 text") from error
            return _plain(row, sample, members, embedded)


def _plain(row: Any, sample: _Sample, members: Mapping[str, _Member], embedded: Any) -> dict:
    """The json row with the media members in place of its media, in the tar's order."""
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise bad_record(f"{sample.key} has no json member with an object or messages, and no txt")
    row = {"id": sample.key, **row}
    for many, one, suffixes in (("images", "image", _IMAGES), ("videos", "video", _VIDEOS)):
        found = [name for name in members if name.rpartition(".")[2] in suffixes]
        named = row.get(many) if row.get(many) is not None else row.get(one)
        count = len(found) if named is None else len(named) if isinstance(named, list) else 1
        if count != len(found):
            raise bad_record(f"{sample.key}.json names {count} {many} and the tar has {len(found)}")
        for name in (many, one):
            row.pop(name, None)
        if found:
            single = len(found) == 1 and "caption" in row
            row[one if single else many] = (
                embedded(found[0]) if single else [embedded(name) for name in found]
            )
    return row


def _packed(row: Any, sample: _Sample, members: Mapping[str, _Member], embedded: Any) -> dict:
    """The sample `number` of a packed sample."""
    number = sample.number
    if number is None or not isinstance(row, Mapping):
        raise bad_record(
            f"{sample.key}.json needs `images`, `prompts` and `captions`, lists by sample"
        )

    def of(name: str) -> Any:
        values = row.get(name)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) != len(row["captions"]):
            raise bad_record(
                f"{sample.key}.json: {name} must be a list with one entry for each sample"
            )
        return values[number]

    def texts(name: str) -> list[Any]:
        value = of(name)
        return value if isinstance(value, list) else [value]

    prompts, captions = texts("prompts"), texts("captions")
    if len(prompts) != len(captions):
        raise bad_record(f"sample {number} has {len(prompts)} prompts and {len(captions)} captions")
    pairs = zip(prompts, captions, strict=True)
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    images = of("images") or []
    if isinstance(images, list):
        names = [f"img{number}_{j}" for j in range(len(images))]
    else:
        names = [f"img{number}"]
    result = {
        "id": f"{sample.key}/{number}",
        "messages": turns,
        "images": [embedded(f"{name}.jpg") for name in names],
        "fps": of("fps"),
        "timestamp_decimal": of("timestamp_decimal"),
    }
    if any(f"{name}.npy" in members for name in names):
        result["patch_positions"] = [embedded(f"{name}.npy") for name in names]
    return result
