"""The state from which a loader resumes, and what both ways of packing share of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from ov2_jax.core.errors import DataError
from ov2_jax.data.loader.counts import LoaderCounts


def check_identity(identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises DataError if a loader of other data made the state."""
    for name, value in identity.items():
        then = state["identity"].get(name)
        if then != value:
            raise DataError(
                f"The checkpoint's data state was made with {name} {then} but this run has "
                f"{value}; resume with the same, or start the data anew."
            )


def share_state(states: Sequence[Mapping[str, Any]], index: int, count: int) -> dict[str, Any]:
    """The state from which process `index` of `count` resumes.

    `states` are those of all processes before. If their number is the same, each process resumes
    from its own. If it changed, which only a plan allows, process 0 gets the sum of all counts and
    the others start at 0. Raises DataError.
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
    """Steps from an upstream iterator that is opened at `_next`, with counts."""

    def __init__(self, counts: LoaderCounts, identity: Mapping[str, Any], share: int) -> None:
        super().__init__()
        self._counts, self._identity, self._share = counts, identity, share
        self._upstream: grain.DatasetIterator | None = None
        self._next = 0

    def get_state(self) -> dict[str, Any]:
        return {
            "identity": dict(self._identity),
            "share": self._share,
            "next": self._next,
            **self._counts.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        check_identity(self._identity, state)
        self._close_upstream()
        self._next = state["next"]
        self._counts.set_state(state)

    def _close_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None

    def close(self) -> None:
        self._close_upstream()
        super().close()
