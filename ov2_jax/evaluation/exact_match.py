"""Exact match on held-out samples, by generating the answers.

The last assistant turn of a sample is the expected answer, everything before it is the prompt.
"""

import collections
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from etils import epath

from ov2_jax.config.data import DataConfig, SourceConfig
from ov2_jax.core.files import write_file
from ov2_jax.core.progress import progress_bar
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sample import EncodedSample
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.parsing import parse_record
from ov2_jax.generation.generator import Generator, Sampling

_THREADS = 4
# Prompts of so many batches are sorted by length, so that a batch is padded little; as many more
# are encoded by the threads in the meantime. A clip of 64 frames at 392 px takes 30 MB.
_SORTED_BATCHES = 4


class Answer(NamedTuple):
    """The answer to one sample; `got` is None if the sample could not be read."""

    id: str
    task: str
    expected: str
    got: str | None
    problem: str = ""

    @property
    def right(self) -> bool:
        return self.got is not None and self.got.strip() == self.expected.strip()


class _Question(NamedTuple):
    """A sample that is to be answered; `prompt` is None if it could not be read."""

    number: int  # in its source
    prompt: EncodedSample | None
    answer: Answer  # `got` is still missing


def evaluate(
    generator: Generator,
    data: DataConfig,
    source: SourceConfig,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
) -> list[Answer]:
    """Answers every sample of a source, in its order; an unreadable sample counts as wrong.

    Samples are encoded while earlier ones are answered, a few batches ahead.
    """
    encoder = SampleEncoder(data, generator.config, generator.tokenizer)
    records = RecordSource([source])
    answers: dict[int, Answer] = {}
    ahead = _SORTED_BATCHES * batch_size
    questions = _questions(records, encoder, ahead)
    with progress_bar("evaluate", len(records)) as advance:
        while group := list(itertools.islice(questions, ahead)):
            answers |= {q.number: q.answer for q in group}
            readable = [q for q in group if q.prompt is not None]
            readable.sort(key=lambda q: len(q.prompt.tokens))
            for start in range(0, len(readable), batch_size):
                batch = readable[start : start + batch_size]
                texts = _answer(generator, batch, batch_size, Sampling(max_new_tokens))
                for question, text in zip(batch, texts, strict=True):
                    answers[question.number] = question.answer._replace(got=text)
            advance(len(group))
    return [answers[i] for i in range(len(records))]


def _answer(
    generator: Generator, batch: Sequence[_Question], batch_size: int, sampling: Sampling
) -> list[str]:
    """A short batch is filled up with its first prompt: one shape less to compile."""
    prompts = [q.prompt for q in batch]
    prompts += prompts[:1] * (batch_size - len(batch))
    return generator(prompts, sampling)[: len(batch)]


def _questions(records: RecordSource, encoder: SampleEncoder, ahead: int) -> Iterator[_Question]:
    """All samples in order; threads encode the next `ahead` ones."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: collections.deque[Future[_Question]] = collections.deque()
        for number in range(len(records)):
            waiting.append(pool.submit(_question, records, encoder, number))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _question(records: RecordSource, encoder: SampleEncoder, number: int) -> _Question:
    raw = records[number]
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
        return _Question(number, None, Answer(f"{raw.file}:{raw.line}", "", "", None, str(e)))
    return _Question(number, prompt, Answer(record.id, record.task, last["content"], None))


def accuracy_by_task(answers: Sequence[Answer]) -> dict[str, tuple[int, int]]:
    """task -> (right answers, all answers)."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for answer in answers:
        counts[answer.task or "(no task)"][0] += answer.right
        counts[answer.task or "(no task)"][1] += 1
    return {task: (right, n) for task, (right, n) in sorted(counts.items())}


def write_answers(answers: Sequence[Answer], path: epath.PathLike) -> None:
    """One JSON line an answer, with `right`."""
    lines = [json.dumps({**a._asdict(), "right": a.right}) + "\n" for a in answers]
    write_file(epath.Path(path), "".join(lines).encode())
