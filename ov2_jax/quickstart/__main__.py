"""The whole pipeline in one command: python -m ov2_jax.quickstart [--out=runs/quickstart]

Writes a small data set of real files, trains a small model on it (configs/quickstart.py), answers
held-out questions, exports a Hugging Face folder, and ends with a table. Run again, it continues
where it stopped.
"""

import runpy
import shutil
import sys
import time
from pathlib import Path

import jax
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from conversion import to_hf
from ov2_jax.config.build import experiment_from
from ov2_jax.config.data import SourceConfig
from ov2_jax.core.program import Given, run
from ov2_jax.evaluation.exact_match import Answer, accuracy_by_task, evaluate, write_answers
from ov2_jax.generation.load import open_checkpoint
from ov2_jax.quickstart.dataset import write_dataset
from ov2_jax.quickstart.tasks import CHANCE
from ov2_jax.train import train

_CONFIG = Path(__file__).parents[2] / "configs/quickstart.py"
_NEEDED = 0.8


def _result_table(answers: list[Answer]) -> Table:
    examples = {a.task: a for a in answers}
    table = Table(title="Held-out samples, answered by generation")
    for column in ("task", "exact match", "chance", "samples", "an expected answer", "its answer"):
        table.add_column(column, justify="right" if column in ("exact match", "chance") else "left")
    for task, (right, n) in accuracy_by_task(answers).items():
        a = examples[task]
        table.add_row(
            task, f"{right / n:.2f}", f"{CHANCE[task]:.2f}", str(n), a.expected, str(a.got)
        )
    right = sum(a.right for a in answers)
    table.add_row("all", f"{right / len(answers):.2f}", "", str(len(answers)), "", "", style="bold")
    return table


def _define_flags() -> None:
    flags.DEFINE_string("out", "runs/quickstart", "Where everything is written.")
    flags.DEFINE_integer("steps", None, "Training steps instead of the config's.")


def main(given: Given) -> None:
    console, out, start = Console(), Path(given.out), time.perf_counter()

    def stage(sentence: str) -> None:
        console.print(f"[{time.perf_counter() - start:4.0f} s] {sentence}", markup=False)

    stage("1/4 Writing pictures, clips and chats ...")
    data = write_dataset(out / "data")
    config = runpy.run_path(str(_CONFIG))["get_config"]()
    config.workdir = str(out / "model")
    config.data.sources = ({"path": str(data.train_jsonl)},)
    if given.steps is not None:
        config.steps = given.steps
    experiment = experiment_from(config)

    stage(f"2/4 Training {experiment.steps} steps on {jax.devices()[0].platform} ...")
    trained = train(experiment)
    if trained < experiment.steps:
        raise SystemExit(f"Training stopped at step {trained}; run the same command to go on.")

    stage("3/4 Answering held-out questions ...")
    generator, data_config = open_checkpoint(out / "model")
    heldout = SourceConfig(str(data.heldout_jsonl))
    answers = evaluate(generator, data_config, heldout, max_new_tokens=8)
    write_answers(answers, out / "answers.jsonl")

    stage("4/4 Exporting a Hugging Face folder ...")
    export = out / "hf"
    if export.exists():  # made by an earlier call, from an earlier checkpoint
        shutil.rmtree(export)
    to_hf.convert(out / "model", export)

    console.print(_result_table(answers))
    accuracy = sum(a.right for a in answers) / len(answers)
    if accuracy < _NEEDED:
        console.print(f"Below {_NEEDED}: something is wrong, or --steps was too small.")
    places = Table(show_header=False, box=None)
    for name, path in (
        ("data set", out / "data"),
        ("checkpoints, metrics", out / "model"),
        ("rejected samples", out / "model/rejected.jsonl"),
        ("answers", out / "answers.jsonl"),
        ("Hugging Face folder", export),
    ):
        places.add_row(name, str(path))
    console.print(places)
    picture = next(iter(sorted((out / "data/heldout/shape").iterdir())))
    print(
        f"Done in {(time.perf_counter() - start) / 60:.1f} minutes. Next:\n"
        f"  {sys.executable} -m ov2_jax.generate --checkpoint={export} --image={picture} "
        '--prompt="What shape is it?"\n'
        f"  tensorboard --logdir={out / 'model/tensorboard'}   (pip install tensorboard)\n"
        "  docs/training.md: the same with a real checkpoint and your own data"
    )


if __name__ == "__main__":
    run(main, _define_flags, verbosity=logging.ERROR)
