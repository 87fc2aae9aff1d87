"""Exact match on held-out samples, by generating the answers.

    python -m ov2_jax.evaluate --checkpoint=DIR --data=heldout.jsonl --out=answers.jsonl

Samples have the form of training samples (LLaVA JSON or JSONL). The last assistant turn is the
expected answer, everything before it is the prompt. Accuracy is reported for every value of the
samples' `task` field.
"""

from absl import flags, logging

from ov2_jax.config.data import SourceConfig
from ov2_jax.core.program import Given, run
from ov2_jax.evaluation.exact_match import accuracy_by_task, evaluate, write_answers
from ov2_jax.generation.load import open_checkpoint


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "As for ov2_jax.generate.", required=True)
    flags.DEFINE_string("data", None, "JSON or JSONL of held-out samples.", required=True)
    flags.DEFINE_string("root", None, "Folder of the media; by default the data's own.")
    flags.DEFINE_string("out", None, "JSONL file to write every answer to.")
    flags.DEFINE_enum("video-input", "uniform", ["uniform", "codec"], "How clips are read.")
    flags.DEFINE_integer("batch-size", 32, "Prompts answered together.", lower_bound=1)
    flags.DEFINE_integer("max-new-tokens", 64, "Longest answer, in tokens.", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the computation.")


def main(given: Given) -> None:
    generator, data = open_checkpoint(given.checkpoint, dtype=given.dtype)
    answers = evaluate(
        generator,
        data,
        SourceConfig(given.data, given.root, video=given.video_input),
        batch_size=given.batch_size,
        max_new_tokens=given.max_new_tokens,
    )
    if given.out is not None:
        write_answers(answers, given.out)
    table = accuracy_by_task(answers)
    for task, (right, n) in table.items():
        print(f"{task:20s} {right / n:6.3f}  ({right} of {n})")
    right, n = sum(r for r, _ in table.values()), len(answers)
    print(f"{'all':20s} {right / n:6.3f}  ({right} of {n})")


if __name__ == "__main__":
    run(main, _define_flags, verbosity=logging.ERROR)
