"""Exact match on held-out samples, by generating the answers.

python -m ov2_jax.evaluate --checkpoint=DIR --data=heldout.jsonl --out=answers.jsonl

Samples are those of training (LLaVA JSON or JSONL); the last assistant turn is the expected answer,
everything before it the prompt. Accuracy is reported for every value of the samples' `task` field.
"""

import collections
import json
from typing import NamedTuple

from absl import app, flags, logging
from etils import epath
from rich.progress import track

from conversion.errors import ConversionError
from ov2_jax.checkpoint_dir import CheckpointError
from ov2_jax.data.config import DataConfig, SourceConfig
from ov2_jax.data.encode import SampleEncoder
from ov2_jax.data.errors import DataError, SampleError
from ov2_jax.data.records import RecordSource, parse_record
from ov2_jax.generation.generator import Generator, Sampling
from ov2_jax.generation.load import open_checkpoint
from ov2_jax.model.config import ConfigError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "As for ov2_jax.generate.")
_DATA = flags.DEFINE_string("data", None, "JSON or JSONL of held-out samples.")
_ROOT = flags.DEFINE_string("root", None, "Folder of the media; default: the data's own.")
_OUT = flags.DEFINE_string("out", None, "JSONL to write every answer to.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Prompts answered together.", lower_bound=1)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Longest answer.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Weights and compute.")


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


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.ERROR)  # Orbax tells its whole life at INFO
    try:
        generator, data = open_checkpoint(_CHECKPOINT.value, dtype=_DTYPE.value)
        answers = evaluate(
            generator,
            data,
            SourceConfig(_DATA.value, _ROOT.value),
            batch_size=_BATCH.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
        )
    except (ConfigError, DataError, CheckpointError, ConversionError) as e:
        raise SystemExit(f"{type(e).__name__}: {e}") from e
    if _OUT.value is not None:
        write_answers(answers, _OUT.value)
    table = accuracy_by_task(answers)
    for task, (right, n) in table.items():
        print(f"{task:20s} {right / n:6.3f}  ({right} of {n})")
    right, n = sum(r for r, _ in table.values()), len(answers)
    print(f"{'all':20s} {right / n:6.3f}  ({right} of {n})")


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "data"])
    app.run(main)
