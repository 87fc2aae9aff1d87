"""What goes wrong with data: one sample (set aside and counted) or the whole run (stops it)."""

from typing import NamedTuple

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


def describe(error: BaseException) -> str:
    """The kind of an exception and its text, also where the text cannot be had."""
    try:
        text = str(error)
    except Exception:  # one that a broken file made, from bytes that are no text
        text = "it has no text"
    return f"{type(error).__name__}: {text}"


class DataError(RuntimeError):
    """The data as a whole cannot be used; the message says why and what to do."""


class SampleError(Exception):
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
