"""Reads the samples of a plan's packs."""

from typing import Any

from ov2_jax.config.data import DataConfig
from ov2_jax.core.errors import DataError
from ov2_jax.core.files import read_json
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.plan.fingerprint import difference, file_inputs, mixture_inputs
from ov2_jax.data.plan.folder import MANIFEST, PackPlan
from ov2_jax.data.plan.packed_shards import PackedShards
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sample import EncodedSample
from ov2_jax.data.sources.index import RecordSource

Samples = list[EncodedSample | Rejected]


class PackReader:
    """Reads and encodes the samples of pack n of a plan: `reader(n)`.

    A sample whose length is not the planned one becomes a Rejected.
    """

    def __init__(self, plan: PackPlan, records: RecordSource, encoder: SampleEncoder) -> None:
        self._plan, self._records, self._encoder = plan, records, encoder

    def __call__(self, pack: int) -> Samples:
        return [self._sample(int(record)) for record in self._plan.members(pack)]

    def _sample(self, record: int) -> EncodedSample | Rejected:
        sample = self._encoder(self._records[record])
        if isinstance(sample, Rejected):
            return sample
        tokens, windows = self._plan.size(record)
        got = sample.windows.tolist()
        if len(sample.tokens) == tokens and got == list(windows):
            return sample
        detail = (
            f"it has {len(sample.tokens)} tokens and {len(got)} windows of {sum(got)} patches, in "
            f"the plan {tokens}, {len(windows)} and {sum(windows)}; if the data changed, prepare "
            "it anew"
        )
        return Rejected("plan_mismatch", detail, sample.id, sample.file, sample.line)


def open_plan(
    data: DataConfig, inputs: dict[str, Any], encoder: SampleEncoder
) -> tuple[PackPlan, PackReader | PackedShards]:
    """Opens the plan of data.plan, and the reader of its packs' samples.

    `inputs` are this run's `encoding_inputs`. Raises DataError, which names the first value in
    which this run differs from the plan.
    """
    plan = PackPlan(data.plan)
    then = read_json(plan.folder / MANIFEST)["inputs"]
    records = None
    if plan.info.packed_files:
        inputs = inputs | {name: value for name, value in then.items() if " file " in name}
    else:
        records = RecordSource(data.sources)
        inputs = inputs | file_inputs(records.files)
    found = difference(then, inputs, moved=True)
    found = found or difference(plan.info.inputs, mixture_inputs(data))
    if found is not None:
        raise DataError(
            f"data.plan {data.plan} was made with {found}; change it back, or run "
            "ov2_jax.data.prepare with this config and another --out."
        )
    if records is None:
        return plan, PackedShards(plan.packed_files(), plan.packs)
    return plan, PackReader(plan, records, encoder)
