"""Exact match on held-out samples, by generating the answers.

python -m ov2_jax.evaluate --checkpoint=DIR --data=heldout.jsonl --out=answers.jsonl

Samples are those of training (LLaVA JSON or JSONL); the last assistant turn is the expected answer,
everything before it the prompt. Accuracy is reported for every value of the samples' `task` field.
"""

import argparse
import sys

from absl import logging

from conversion.errors import ConversionError
from ov2_jax.config.data import SourceConfig
from ov2_jax.core.errors import CheckpointError, ConfigError, DataError
from ov2_jax.evaluation.exact_match import accuracy_by_task, evaluate, write_answers
from ov2_jax.generation.load import open_checkpoint


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
