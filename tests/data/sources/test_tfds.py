"""A TFDS data set, written by a TFDS builder and read without TensorFlow."""

import io
import pickle

import pytest
import tensorflow_datasets as tfds

from ov2_jax.config.data import SourceConfig
from ov2_jax.core.errors import ConfigError, DataError
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.parsing import parse_record
from tests.data.files import chat, picture
from tests.tiny import data_config, tiny_model, tokenizer

_TEXT = tfds.features.Text()
_TURN = tfds.features.Sequence({"from": _TEXT, "value": _TEXT})
_ROUND = tfds.features.Sequence({"user": _TEXT, "assistant": _TEXT})


def builder(name: str, features: dict, rows: list[dict], where) -> str:
    """Writes the data set; returns its folder."""

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(rows)}

        def _generate_examples(self, rows):
            yield from ((str(i), row) for i, row in enumerate(rows))

    Made.name = name
    Made(data_dir=where, file_format="array_record").download_and_prepare()
    return str(where / name / "1.0.0")


@pytest.fixture(scope="module")
def png(tmp_path_factory):
    return picture(tmp_path_factory.mktemp("png") / "a.png", 60, 90).read_bytes()


def outcomes(source) -> dict[str, str]:
    encoder = SampleEncoder(data_config(), tiny_model(), tokenizer())
    found = {}
    for i in range(len(source)):
        result = encoder(source[i])
        found[result.id] = result.reason if isinstance(result, Rejected) else "good"
    return found


def test_llava_form(tmp_path, png):
    turns = [{"from": "human", "value": "<image>\nQué?"}, {"from": "gpt", "value": "A"}]
    image = tfds.features.Image(encoding_format="png")
    features = {"id": _TEXT, "image": image, "conversations": _TURN, "rating": _TEXT}
    rows = [
        {"id": f"r{i}", "image": io.BytesIO(data), "conversations": turns, "rating": "5"}
        for i, data in enumerate((png, png, png[:200]))
    ]
    folder = builder("llava", features, rows, tmp_path)
    source = RecordSource([SourceConfig(folder, format="tfds")])
    source = pickle.loads(pickle.dumps(source))
    assert outcomes(source) == {"r0": "good", "r1": "good", "r2": "bad_image"}
    record = next(r for r in map(parse_record, map(source.__getitem__, range(3))) if r.id == "r1")
    assert record.images[0].data == png and record.source == "llava"
    assert list(record.messages) == chat("<image>\nQué?", "A") and record.file == folder


def test_finevision_form_with_a_sequence_of_pictures(tmp_path, png):
    features = {
        "images": tfds.features.Sequence(tfds.features.Image(encoding_format="png")),
        "texts": _ROUND,
    }
    rows = [
        {"images": [io.BytesIO(png), io.BytesIO(png)], "texts": [{"user": "Q", "assistant": "A"}]}
    ]
    folder = builder("finevision", features, rows, tmp_path)
    source = RecordSource([SourceConfig(folder, format="tfds", split="train[:1]")])
    assert outcomes(source) == {"finevision:1": "good"}
    assert parse_record(source[0]).images[1].shape == (60, 90, 3)


def test_what_cannot_be_used(tmp_path):
    folder = builder("other", {"question": _TEXT}, [{"question": "Q"}], tmp_path)
    for path, split, words in (
        (folder, None, "columns question, which is no known layout"),
        (folder, "validation", "cannot be read by TFDS as split 'validation'"),
        (str(tmp_path), None, "cannot be read by TFDS"),
    ):
        with pytest.raises(DataError, match=words):
            RecordSource([SourceConfig(path, format="tfds", split=split)])
    with pytest.raises(ConfigError, match="source.split is 'test'"):
        SourceConfig("a.jsonl", split="test")
