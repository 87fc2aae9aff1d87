"""Which values a plan depends on, and how the first difference is named."""

import dataclasses
import json

import pytest

from ov2_jax.config.data import SourceConfig
from ov2_jax.data.plan.fingerprint import difference, encoding_inputs, file_inputs, mixture_inputs
from tests.data.prepare.folders import PACK
from tests.tiny import data_config, tiny_model, tokenizer


def inputs(data, **changes) -> dict:
    arguments = {"pack": PACK, "seed": 7} | changes
    return encoding_inputs(
        data, tiny_model(), arguments["pack"], tokenizer(), seed=arguments["seed"]
    )


def test_the_first_value_that_differs_is_named():
    assert difference({"a": 1, "b": [2]}, {"a": 1, "b": [2]}) is None
    assert difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b 2, but this run has 3"
    assert difference({"a": 1}, {}) == "a 1, but this run has 'missing'"
    assert difference({}, {"a": 1}) == "a 'missing', but this run has 1"


def test_places_of_sources_may_differ_if_the_data_moved():
    then, now = ({f"data.sources[0].{x}": f"{at}/{x}" for x in ("path", "root")} for at in "ab")
    assert difference(then, now) is not None and difference(then, now, moved=True) is None
    name = {"data.sources[0].title": "a"}
    assert difference(then | name, now, moved=True) == (
        "data.sources[0].title 'a', but this run has 'missing'"
    )


@pytest.mark.parametrize(
    "changes",
    [{"num_workers": 3}, {"shuffle": False}, {"lookahead": 5}, {"plan": "x"}],
)
def test_fields_that_do_not_change_a_sample_do_not_count(tmp_path, changes):
    plain = data_config(tmp_path / "a.jsonl")
    assert inputs(dataclasses.replace(plain, **changes)) == inputs(plain)


def test_the_seed_counts_only_if_a_coin_is_thrown(tmp_path):
    plain = data_config(tmp_path / "a.jsonl")
    assert inputs(plain, seed=8) == inputs(plain)
    coin = SourceConfig(str(tmp_path / "a.jsonl"), video="alternate")
    coin = dataclasses.replace(plain, sources=(coin,))
    assert difference(inputs(coin), inputs(coin, seed=8)) == "seed 7, but this run has 8"


def test_inputs_are_json_as_they_come_back(tmp_path):
    found = inputs(data_config(tmp_path / "a.jsonl"))
    assert json.loads(json.dumps(found)) == found
    assert found["pack.vision_rows"] == [[4, 64], [2, 128]]


def test_files_count_by_name_records_and_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"12345")
    folder = tmp_path / "set/1.0.0"
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(b"123")
    (folder / "y").write_bytes(b"4567")
    assert file_inputs([[(str(tmp_path / "a.jsonl"), 1)], [(str(folder), 9)]]) == {
        "data.sources[0] file 1": "a.jsonl (1 records, 5 bytes)",
        "data.sources[1] file 1": "1.0.0 (9 records, 7 bytes)",
    }


def test_a_mixture_counts_by_its_shares(tmp_path):
    sources = (
        SourceConfig(sources=(SourceConfig("a.jsonl", epochs=2), SourceConfig("b.jsonl", cap=3))),
        SourceConfig("c.jsonl"),
    )
    found = mixture_inputs(data_config(tmp_path / "a.jsonl", sources=sources))
    assert found["data.sources[0].sources[0].epochs"] == 2
    assert found["data.sources[0].sources[1].cap"] == 3
    assert found["data.sources[1].weight"] is None and found["data.shuffle"] is True
