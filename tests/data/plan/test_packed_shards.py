"""Packed shards: every field of a sample comes back, rejected samples and odd names included."""

import numpy as np
import pytest

from ov2_jax.core.errors import DataError
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.plan.packed_shards import (
    PackedShards,
    samples_from_bytes,
    samples_to_bytes,
    write_packs,
)
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sources.index import RecordSource
from tests.data.loader.test_loader import write_data
from tests.data.prepare.folders import CONFIG, PACK
from tests.tiny import data_config, tiny_model, tokenizer


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list:
    config = data_config(write_data(tmp_path_factory.mktemp("data"), n=10), **CONFIG)
    records = RecordSource(config.sources)
    encoder = SampleEncoder(config, tiny_model(), tokenizer(), PACK, seed=7)
    found = [encoder(records[i]) for i in range(len(records))]
    assert len({type(sample) for sample in found}) == 2
    return [found[0]._replace(file="a\udcff.jsonl"), *found[1:]]


def assert_same(actual: list, expected: list) -> None:
    for sample, other in zip(actual, expected, strict=True):
        assert type(sample) is type(other)
        for value, good in zip(sample, other, strict=True):
            np.testing.assert_array_equal(value, good, strict=isinstance(good, np.ndarray))


def test_samples_come_back_from_a_record(samples):
    assert_same(samples_from_bytes(samples_to_bytes(samples)), samples)
    rejected = [sample for sample in samples if isinstance(sample, Rejected)]
    assert_same(samples_from_bytes(samples_to_bytes(rejected)), rejected)


def test_packs_come_back_by_number_and_none_may_be_missing(samples, tmp_path):
    packs = [samples[:3], samples[3:4], samples[4:]]
    files = [str(tmp_path / f"{i}.array_record") for i in range(2)]
    write_packs(tmp_path / "0.array_record", packs[:2])
    write_packs(tmp_path / "1.array_record", packs[2:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.array_record", "1.array_record"]
    read = PackedShards(files, 3)
    for number in (2, 0, 1):
        assert_same(read(number), packs[number])
    with pytest.raises(DataError, match="hold 3 packs of 4; run .* --packed-shards again"):
        PackedShards(files, 4)


def test_a_file_that_breaks_off_leaves_nothing(samples, tmp_path):
    def packs():
        yield samples
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_packs(tmp_path / "0.array_record", packs())
    assert not list(tmp_path.iterdir())
