"""Samples are encoded as the next batches need them, and every one is answered for, in order."""

import json

from ov2_jax.config.data import SourceConfig
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.evaluation.exact_match import Answer, _questions, accuracy_by_task, write_answers
from tests.data.files import chat, write_jsonl
from tests.tiny import data_config, tiny_model, tokenizer


class CountedRecords(RecordSource):
    """Counts what is read."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


def test_only_the_next_samples_are_encoded(tmp_path):
    samples = [{"id": str(i), "messages": chat(f"Say {i}", f"{i}")} for i in range(20)]
    samples[5] = "{broken"
    path = write_jsonl(tmp_path / "heldout.jsonl", samples)
    records = CountedRecords([SourceConfig(str(path))])
    questions = _questions(records, SampleEncoder(data_config(), tiny_model(), tokenizer()), 3)
    first = next(questions)
    assert records.read <= 4
    rest = list(questions)
    assert [q.number for q in (first, *rest)] == list(range(20))
    unreadable = [q for q in rest if q.prompt is None]
    assert [q.number for q in unreadable] == [5]
    assert unreadable[0].answer.problem.startswith("bad_json")


def test_an_unreadable_sample_is_wrong_and_listed(tmp_path):
    answers = [Answer("1", "count", "4", " 4\n"), Answer("2", "count", "3", None, "bad_image: x")]
    assert accuracy_by_task(answers) == {"count": (1, 2)}
    write_answers(answers, tmp_path / "answers.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(x["id"], x["right"], x["problem"]) for x in lines] == [
        ("1", True, ""),
        ("2", False, "bad_image: x"),
    ]
