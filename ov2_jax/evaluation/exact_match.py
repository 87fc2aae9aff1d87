"""Exact match on held-out samples, by generating the answers."""

import collections
import json
from typing import NamedTuple

from etils import epath
from rich.progress import track

from ov2_jax.config.data import DataConfig, SourceConfig
from ov2_jax.data.encoding.encode import SampleEncoder
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.records import parse_record
from ov2_jax.generation.generator import Generator, Sampling


class Answer(NamedTuple):
    """One held-out sample; `got` is None where the sample could not be read."""

    id: str
    task: str
    expected: str
    got: str | None
    problem: str = ""

    @property
    def right(self) -> bool:
        return self.got is not None and self.got.strip() == self.expected.strip()


def evaluate(
    generator: Generator,
    data: DataConfig,
    source: SourceConfig,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
) -> list[Answer]:
    """Answers every sample of a source, in its order; an unreadable sample counts as wrong."""
    encoder = SampleEncoder(data, generator.config, generator.tokenizer)
    records = RecordSource([source])
    answers: dict[int, Answer] = {}
    prompts = []
    for i in range(len(records)):
        raw = records[i]
        try:
            record = parse_record(raw)
            *messages, last = record.messages
            if last["role"] != "assistant" or not messages:
                raise SampleError("bad_turns", "the sample does not end with an answer")
            prompt = encoder.encode_prompt(
                messages,
                record.images,
                record.videos,
                fps=record.fps,
                timestamp_decimal=record.timestamp_decimal,
                video_input=encoder.video_input(record),
                bit_costs=record.bit_costs,
            )
        except SampleError as e:
            answers[i] = Answer(f"{raw.file}:{raw.line}", "", "", None, str(e))
            continue
        prompts.append((i, record, last["content"], prompt))
    # Prompts of like length share a batch, so that little of it is padding.
    prompts.sort(key=lambda p: len(p[3].tokens))
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    for batch in track(batches, description="evaluate", transient=True):
        # A short batch is filled up with its first prompt: one shape less to compile.
        filled = [p for *_, p in batch] + [batch[0][3]] * (batch_size - len(batch))
        texts = generator(filled, Sampling(max_new_tokens))
        for (i, record, expected, _), text in zip(batch, texts, strict=False):
            answers[i] = Answer(record.id, record.task, expected, text)
    return [answers[i] for i in range(len(records))]


def accuracy_by_task(answers: list[Answer]) -> dict[str, tuple[int, int]]:
    """task -> (right, all)."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for answer in answers:
        counts[answer.task or "(no task)"][0] += answer.right
        counts[answer.task or "(no task)"][1] += 1
    return {task: (right, n) for task, (right, n) in sorted(counts.items())}


def write_answers(answers: list[Answer], path: epath.PathLike) -> None:
    """One JSON line an answer, with `right`."""
    lines = [json.dumps({**a._asdict(), "right": a.right}) + "\n" for a in answers]
    path = epath.Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(lines))
    part.replace(path)
