"""Samples are encoded as the next batches need them, and every one is answered for, in order."""

import json
from concurrent.futures import ThreadPoolExecutor

from ov2_jax.config.data import SourceConfig
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.evaluation import exact_match
from ov2_jax.evaluation.exact_match import Answer, _questions, accuracy_by_task, write_answers
from tests.data.files import chat, write_jsonl
from tests.tiny import data_config, tiny_model, tokenizer


class CountedPool(ThreadPoolExecutor):
    """Counts what the threads are asked to encode, whether they have come to it or not."""

    asked = 0

    def submit(self, *args, **kwargs):
        CountedPool.asked += 1
        return super().submit(*args, **kwargs)


def test_only_the_next_samples_are_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(exact_match, "ThreadPoolExecutor", CountedPool)
    samples = [{"id": str(i), "messages": chat(f"Say {i}", f"{i}")} for i in range(20)]
    samples[5] = "{broken"
    path = write_jsonl(tmp_path / "heldout.jsonl", samples)
    records = RecordSource([SourceConfig(str(path))])
    questions = _questions(records, SampleEncoder(data_config(), tiny_model(), tokenizer()), 3)
    first = next(questions)
    assert CountedPool.asked == 4  # the first, and three ahead
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
