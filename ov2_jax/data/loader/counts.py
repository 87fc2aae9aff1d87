"""Counts of the samples that a process reads, and the end of a run that rejects too many."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ov2_jax.config.data import DataConfig
from ov2_jax.core.errors import DataError
from ov2_jax.data.rejected import Rejected, RejectLog
from ov2_jax.data.sample import EncodedSample


class CountedSample(NamedTuple):
    """What counting needs of a sample; small to send from a worker."""

    source: str
    tokens: int
    dropped_rounds: int
    uniform_fallbacks: int


def counted(sample: EncodedSample) -> CountedSample:
    return CountedSample(
        sample.source, len(sample.tokens), sample.dropped_rounds, sample.uniform_fallbacks
    )


class _Packed(NamedTuple):
    """What is packed of a data set so far."""

    samples: int
    tokens: int


class Totals(NamedTuple):
    """Counts since the start of training."""

    seen: int  # samples read
    rejected: int
    dropped_rounds: int  # samples that lost rounds (on_long="drop_rounds")
    uniform_fallbacks: int  # clips too short for codec-style reading, read as uniform frames
    mixture: tuple[tuple[str, int, int], ...]  # (data set, samples, tokens) packed


class LoaderCounts:
    """Counts samples, logs rejected ones, and saves and restores the counts.

    `names` are those of the data sets; `epoch` is how many samples this process reads in an epoch.
    """

    def __init__(self, data: DataConfig, names: Sequence[str], epoch: int, log: RejectLog) -> None:
        self._data, self._epoch, self._log = data, epoch, log
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._packed = dict.fromkeys(names, _Packed(0, 0))
        self._rejected_in_a_row = 0

    def add_read(self, sample: CountedSample | Rejected) -> None:
        """Counts a sample that was read; raises DataError if too many are rejected."""
        self._counts["seen"] += 1
        if isinstance(sample, Rejected):
            self.reject(sample)
            return
        self._rejected_in_a_row = 0
        self._counts["dropped_rounds"] += sample.dropped_rounds > 0
        self._counts["uniform_fallbacks"] += sample.uniform_fallbacks

    def add_packed(self, sample: CountedSample) -> None:
        before = self._packed[sample.source]
        self._packed[sample.source] = _Packed(before.samples + 1, before.tokens + sample.tokens)

    def reject(self, sample: Rejected) -> None:
        """Logs a sample that counts as read already; raises DataError if it is one too many."""
        self._log.add(sample)
        self._reasons[sample.reason] += 1
        self._rejected_in_a_row += 1
        seen, rejected = self._counts["seen"], self._reasons.total()
        allowed = self._data.max_reject_share
        enough = min(self._data.reject_check_after, self._epoch)
        if rejected > allowed * seen and seen >= enough:
            cause = f"that is more than data.max_reject_share {allowed:g} allows"
        elif self._rejected_in_a_row >= self._epoch:
            cause = "a whole epoch had no usable sample"
        else:
            return
        reasons = ", ".join(f"{reason} {n}" for reason, n in self._reasons.most_common(3))
        raise DataError(
            f"{rejected} of {seen} samples were rejected ({reasons}); {cause}. Each is in "
            f"{self._log.path}; the last: {sample.file} line {sample.line}: {sample.detail}."
        )

    def totals(self) -> Totals:
        return Totals(
            self._counts["seen"],
            self._reasons.total(),
            self._counts["dropped_rounds"],
            self._counts["uniform_fallbacks"],
            tuple((name, *packed) for name, packed in self._packed.items()),
        )

    def get_state(self) -> dict[str, Any]:
        return {
            "counts": dict(self._counts),
            "reasons": dict(self._reasons),
            "given": {name: list(packed) for name, packed in self._packed.items()},
            "rejected_in_a_row": self._rejected_in_a_row,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._counts, self._reasons = Counter(state["counts"]), Counter(state["reasons"])
        self._packed = {name: _Packed(*packed) for name, packed in state["given"].items()}
        self._rejected_in_a_row = state["rejected_in_a_row"]
