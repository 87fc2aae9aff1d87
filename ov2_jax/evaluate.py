"""Exact match on held-out samples, by generating the answers.

python -m ov2_jax.evaluate --checkpoint=DIR --data=heldout.jsonl --out=answers.jsonl

Samples are those of training (LLaVA JSON or JSONL); the last assistant turn is the expected answer,
everything before it the prompt. Accuracy is reported for every value of the samples' `task` field.
"""

import argparse
import collections
import json
import sys
from typing import NamedTuple

from absl import logging
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m ov2_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="as for ov2_jax.generate")
    add("--data", required=True, help="JSON or JSONL of held-out samples")
    add("--root", help="folder of the media; default: the data's own")
    add("--out", help="JSONL to write every answer to")
    add("--video-input", default="uniform", choices=["uniform", "codec"], help="how clips are read")
    add("--batch-size", type=int, default=32, help="prompts answered together (32)")
    add("--max-new-tokens", type=int, default=64, help="longest answer (64)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the computation")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.set_verbosity(logging.ERROR)  # Orbax tells its whole life at INFO
    try:
        if args.batch_size < 1:
            raise ConfigError(f"--batch-size is {args.batch_size}; it must be at least 1.")
        generator, data = open_checkpoint(args.checkpoint, dtype=args.dtype)
        answers = evaluate(
            generator,
            data,
            SourceConfig(args.data, args.root, video=args.video_input),
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
        )
    except (ConfigError, DataError, CheckpointError, ConversionError) as e:
        sys.exit(f"{type(e).__name__}: {e}")
    if args.out is not None:
        write_answers(answers, args.out)
    table = accuracy_by_task(answers)
    for task, (right, n) in table.items():
        print(f"{task:20s} {right / n:6.3f}  ({right} of {n})")
    right, n = sum(r for r, _ in table.values()), len(answers)
    print(f"{'all':20s} {right / n:6.3f}  ({right} of {n})")


if __name__ == "__main__":
    main()
