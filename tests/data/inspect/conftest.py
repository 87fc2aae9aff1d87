"""One page of every kind of sample, for all tests of this folder."""

import pytest

from ov2_jax.config.data import SourceConfig
from ov2_jax.config.experiment import Experiment
from ov2_jax.data.inspect.inspect import inspect_data
from ov2_jax.quickstart.dataset import write_dataset
from tests.data.files import chat, picture
from tests.data.files import write_jsonl as jsonl
from tests.data.inspect.pages import HOSTILE, experiment, moving
from tests.tiny import tokenizer


@pytest.fixture(scope="package")
def corpus(tmp_path_factory) -> Experiment:
    folder = tmp_path_factory.mktemp("corpus")
    quickstart = write_dataset(folder / "quickstart", train=60, heldout=7, workers=1)
    moving(folder / "moving.mp4")
    picture(folder / "large.png", 252, 280)
    own = [
        {"id": "codec", "task": "see", "video": "moving.mp4",
         "messages": chat("<video>\nWhat moves?", "A square.")},
        {"id": "hostile", "task": HOSTILE, "messages": chat(f"Repeat: {HOSTILE}", HOSTILE)},
        {"id": "two", "images": ["large.png", "large.png"],
         "messages": chat("<image>\n<image>\nSame?", "Yes.", "Überall?", "Ja, «überall» 你好.")},
        '{"id": "cut", "messages": [',
        {"id": "mute", "messages": chat("Well?", " ")},
    ]  # fmt: skip
    jsonl(folder / "own.jsonl", own)
    return experiment(
        SourceConfig(str(quickstart.train_jsonl), name="quickstart"),
        SourceConfig(str(folder / "own.jsonl"), video="codec", epochs=2),
    )


@pytest.fixture(scope="package")
def page(corpus) -> str:
    return inspect_data(corpus, tokenizer(), count=1000, samples=30, title="tests")
