"""Samples that cannot be used: why, and the list of them on disk."""

import json
from pathlib import Path
from typing import NamedTuple

from etils import epath

from ov2_jax.core.errors import DataError, UserError
from ov2_jax.core.files import write_file

# Why a sample is rejected. The list is fixed, so that counts by reason can be compared.
REASONS = (
    "bad_json",  # the line is not JSON
    "bad_shard",  # the file is damaged there: Parquet, tar, ArrayRecord, ...
    "bad_record",  # readable, but not a sample of the documented form
    "unsupported_field",  # a field that would change the sample's meaning and is not read
    "unknown_role",
    "bad_turns",  # questions and answers do not alternate
    "empty_answer",
    "special_token_in_text",  # chat or vision tokens spelled out in the text
    "placeholder_mismatch",  # marks and media differ in number
    "path_outside_root",
    "missing_file",
    "bad_image",
    "bad_video",
    "video_timeout",
    "bad_aspect",  # one side is over 200 times the other
    "too_long",  # more tokens than a text row
    "window_too_large",  # more patches than the largest vision row
    "too_many_patches",  # its windows do not fit into all vision rows of a pack
    "plan_mismatch",  # its length has changed since the plan was made
    "internal_error",  # an unforeseen exception; its text is in the detail
)

_MOST_CHARACTERS = 2000  # of a detail, which may quote a field of any length


class SampleError(UserError):
    """One sample cannot be used, for a `reason` of REASONS and a `detail` for people."""

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is not a reason; they are {', '.join(REASONS)}.")
        if len(detail) > _MOST_CHARACTERS:
            detail = f"{detail[:_MOST_CHARACTERS]}... ({len(detail)} characters)"
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def bad_record(detail: str) -> SampleError:
    return SampleError("bad_record", detail)


class Rejected(NamedTuple):
    """A rejected sample. It travels through the pipeline in the sample's place, so that the order
    of samples does not depend on the number of workers."""

    reason: str
    detail: str
    id: str
    file: str
    line: int


def rejected_line(rejected: Rejected) -> bytes:
    """A line of rejected.jsonl."""
    line = json.dumps(rejected._asdict(), ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace")


class RejectLog:
    """Appends to `rejected.jsonl`, each sample once, however often it is read.

    Samples that the file already lists count as written, so neither later epochs nor a resumed run
    repeat a line. The file is local, as remote ones cannot be appended to.

    Raises:
      DataError: the file exists and is not a list of rejected samples.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self._path = Path(path)
        self._known: set[tuple[str, int]] = set()
        if self._path.exists():
            data = self._path.read_bytes()
            # A run that was killed while writing leaves half a line, which is cut off.
            whole = data[: data.rfind(b"\n") + 1]
            for line in whole.splitlines():
                try:
                    entry = json.loads(line)
                    self._known.add((entry["file"], entry["line"]))
                except (ValueError, TypeError, KeyError) as error:
                    raise DataError(
                        f"{self._path} is not a list of rejected samples ({error}); move it away "
                        "or name another file."
                    ) from error
            if len(whole) < len(data):
                write_file(self._path, whole)

    @property
    def path(self) -> Path:
        return self._path

    def add(self, rejected: Rejected) -> bool:
        """Writes the sample unless it is known; returns whether it was new."""
        key = (rejected.file, rejected.line)
        if key in self._known:
            return False
        self._known.add(key)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(rejected_line(rejected))
        return True
