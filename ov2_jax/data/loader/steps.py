"""What a step of the loader is, what the loader counts, and the state that it resumes from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from ov2_jax.config.data import DataConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import Batch, VisionRows
from ov2_jax.core.errors import DataError
from ov2_jax.data.packing.build import PackInfo
from ov2_jax.data.rejected import Rejected, RejectLog
from ov2_jax.data.sample import EncodedSample


class StepInfo(NamedTuple):
    """What a step's packs (of this process) hold; `seen` and later ones count from the start."""

    sample_ids: tuple[tuple[str, ...], ...]  # of each pack
    samples: int
    tokens: int
    supervised_tokens: int
    patches: int
    windows: int
    token_slots: int
    patch_slots: int
    class_patches: tuple[int, ...]  # real patches by class of vision rows
    class_slots: tuple[int, ...]
    seen: int  # samples read
    rejected: int
    truncated: int  # samples that lost rounds (on_long="drop_rounds")
    uniform_fallbacks: int  # clips too short for codec-style reading, read as uniform frames
    mixture: tuple[tuple[str, int, int], ...]  # (data set, samples, tokens) packed


class Read(NamedTuple):
    """A sample that was read, as far as counting goes."""

    source: str
    tokens: int
    dropped_rounds: int
    uniform_fallbacks: int

    @classmethod
    def of(cls, sample: EncodedSample) -> "Read":
        return cls(
            sample.source, len(sample.tokens), sample.dropped_rounds, sample.uniform_fallbacks
        )


class _Given(NamedTuple):
    """Samples and tokens that a data set gave so far."""

    samples: int
    tokens: int


class Progress:
    """Counts since the start, and the end of a run whose samples are too often bad.

    `names` are the data sets', `epoch` the samples that this process reads in an epoch.
    """

    def __init__(self, data: DataConfig, names: Sequence[str], epoch: int, log: RejectLog) -> None:
        self._data, self._epoch, self._log = data, epoch, log
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._given = dict.fromkeys(names, _Given(0, 0))
        self._rejected_in_a_row = 0

    def read(self, sample: Read | Rejected) -> None:
        """Counts a sample; raises DataError where too many are rejected."""
        self._counts["seen"] += 1
        if isinstance(sample, Rejected):
            self.reject(sample)
            return
        self._rejected_in_a_row = 0
        self._counts["truncated"] += sample.dropped_rounds > 0
        self._counts["uniform_fallbacks"] += sample.uniform_fallbacks

    def packed(self, sample: Read) -> None:
        before = self._given[sample.source]
        self._given[sample.source] = _Given(before.samples + 1, before.tokens + sample.tokens)

    def reject(self, sample: Rejected) -> None:
        """Writes it down; raises DataError where that is one too many."""
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

    def step(
        self, packs: Sequence[Batch], infos: Sequence[PackInfo], config: PackConfig
    ) -> tuple[Batch, StepInfo]:
        """Packs to one Batch with the leading axis G, and what they hold."""
        fields = [np.stack(arrays) for arrays in zip(*(p[:-1] for p in packs), strict=True)]
        classes = zip(*(p.vision for p in packs), strict=True)
        vision = tuple(
            VisionRows(*(np.stack(a) for a in zip(*rows, strict=True))) for rows in classes
        )
        class_patches = tuple(
            sum(p.class_patches[k] for p in infos) for k in range(len(config.vision_rows))
        )
        info = StepInfo(
            sample_ids=tuple(p.sample_ids for p in infos),
            samples=sum(len(p.sample_ids) for p in infos),
            tokens=sum(p.tokens for p in infos),
            supervised_tokens=sum(p.supervised_tokens for p in infos),
            patches=sum(class_patches),
            windows=sum(p.windows for p in infos),
            token_slots=len(infos) * config.token_slots,
            patch_slots=len(infos) * config.patch_slots,
            class_patches=class_patches,
            class_slots=tuple(len(infos) * r * w for r, w in config.vision_rows),
            seen=self._counts["seen"],
            rejected=self._reasons.total(),
            truncated=self._counts["truncated"],
            uniform_fallbacks=self._counts["uniform_fallbacks"],
            mixture=tuple((name, *count) for name, count in self._given.items()),
        )
        return Batch(*fields, vision), info

    def get_state(self) -> dict[str, Any]:
        return {
            "counts": dict(self._counts),
            "reasons": dict(self._reasons),
            "given": {name: list(count) for name, count in self._given.items()},
            "rejected_in_a_row": self._rejected_in_a_row,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._counts, self._reasons = Counter(state["counts"]), Counter(state["reasons"])
        self._given = {name: _Given(*count) for name, count in state["given"].items()}
        self._rejected_in_a_row = state["rejected_in_a_row"]


def check_identity(identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises DataError if a state was made by a loader of other data."""
    for name, value in identity.items():
        then = state["identity"].get(name)
        if then != value:
            raise DataError(
                f"The checkpoint's data state was made with {name} {then} but this run has "
                f"{value}; resume with the same, or start the data anew."
            )


def share_state(states: Sequence[Mapping[str, Any]], index: int, count: int) -> dict[str, Any]:
    """The state with which process `index` of `count` goes on, from those of all processes before.

    Each goes on with its own. Where their number changed, which only a plan allows, the counts of
    all are added up in process 0 and start anew in the others. Raises DataError.
    """
    if len(states) == count:
        return dict(states[index])
    if states[0]["identity"].get("plan") is None:
        raise DataError(
            f"The checkpoint's data state is that of {len(states)} processes but this run has "
            f"{count}; without data.plan their number must stay the same."
        )
    added = {
        "counts": dict(sum((Counter(s["counts"]) for s in states), Counter())),
        "reasons": dict(sum((Counter(s["reasons"]) for s in states), Counter())),
        "given": {
            name: np.sum([s["given"][name] for s in states], axis=0).tolist()
            for name in states[0]["given"]
        },
    }
    nothing = {"counts": {}, "reasons": {}, "given": {name: [0, 0] for name in added["given"]}}
    counts = nothing if index else added
    return {**states[0], **counts, "rejected_in_a_row": 0}


class ResumableSteps(grain.DatasetIterator):
    """Steps from an upstream iterator that is opened at `_next`, with counts: what both ways of
    packing keep, save and close."""

    def __init__(self, progress: Progress, identity: Mapping[str, Any], share: int) -> None:
        super().__init__()
        self._progress, self._identity, self._share = progress, identity, share
        self._upstream: grain.DatasetIterator | None = None
        self._next = 0

    def get_state(self) -> dict[str, Any]:
        return {
            "identity": dict(self._identity),
            "share": self._share,
            "next": self._next,
            **self._progress.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        check_identity(self._identity, state)
        self._close_upstream()
        self._next = state["next"]
        self._progress.set_state(state)

    def _close_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None

    def close(self) -> None:
        self._close_upstream()
        super().close()
