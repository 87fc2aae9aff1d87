"""What goes wrong with data: one sample (set aside and counted) or the whole run (stops it)."""

import json
from pathlib import Path
from typing import NamedTuple

from ov2_jax.core.errors import DataError, UserError

# Why a sample is set aside. The vocabulary is fixed, so that counts by reason mean something.
REASONS = (
    "bad_json",  # the line is not JSON
    "bad_shard",  # a file that is damaged there: Parquet, tar, ArrayRecord, ...
    "bad_record",  # read, but not a sample of the documented form
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
    "bad_aspect",  # longer than 200 times its short side
    "too_long",  # more tokens than a text row
    "window_too_large",  # more patches than the largest vision row
    "too_many_patches",  # more windows than all vision rows of a pack hold
    "plan_mismatch",  # not of the length that it had when the plan was made
    "internal_error",  # an exception nobody foresaw; its text is in the detail
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


class Rejected(NamedTuple):
    """A sample that was set aside. It travels through the pipeline in the sample's place, so that
    the order of samples does not depend on the number of workers."""

    reason: str
    detail: str
    id: str
    file: str
    line: int


class RejectLog:
    """Appends to `rejected.jsonl`, every sample once however often it comes by.

    What the file already holds counts as written, so neither later epochs nor a resumed run repeat
    a line.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._known: set[tuple[str, int]] = set()
        if self._path.exists():
            data = self._path.read_bytes()
            # A run that was killed while writing leaves half a line, which is cut off.
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                with self._path.open("r+b") as file:
                    file.truncate(len(whole))
            for line in whole.splitlines():
                try:
                    entry = json.loads(line)
                    self._known.add((entry["file"], entry["line"]))
                except (ValueError, TypeError, KeyError) as error:
                    raise DataError(
                        f"{self._path} is not a list of rejected samples ({error}); move it away "
                        "or name another file."
                    ) from error

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
        line = json.dumps(rejected._asdict(), ensure_ascii=False) + "\n"
        with self._path.open("ab") as file:
            file.write(line.encode("utf-8", "backslashreplace"))
        return True
