"""The program: python -m ov2_jax.data.prepare --config=configs/X.py --out=DIR"""

import contextlib
import os
from contextlib import AbstractContextManager

from absl import flags
from rich.console import Console

from ov2_jax.config.build import experiment_from
from ov2_jax.config.start import tokenizer_folder, with_checkpoint_model
from ov2_jax.core.errors import ConfigError
from ov2_jax.core.program import Given, run
from ov2_jax.data.prepare.job import PrepareJob
from ov2_jax.data.prepare.report import show
from ov2_jax.data.prepare.run import prepare
from ov2_jax.data.prepare.runners import ProcessRunner, Runner, beam_runner


def _define_flags() -> None:
    flags.DEFINE_string("out", None, "The folder to write or to go on with.")
    flags.DEFINE_integer("num-workers", None, "Processes; all cores by default.", lower_bound=1)
    flags.DEFINE_integer("shard-size", 1024, "Records that a kill costs at most.", 1)
    flags.DEFINE_integer("epochs", 1, "Epochs of the mixture to plan, each with its packs.", 1)
    flags.DEFINE_bool("packed-shards", False, "Also write encoded packs (docs/prepare.md).")
    flags.DEFINE_integer("packs-per-file", 32, "Packs in a file of packed shards.", 1)
    flags.DEFINE_bool("beam", False, "Do the work as an Apache Beam pipeline.")
    flags.DEFINE_string("beam-args", "", "Its options, e.g. '--runner=FlinkRunner ...'.")
    flags.mark_flag_as_required("out")


def _runner(given: Given) -> AbstractContextManager[Runner]:
    if given.beam:
        return contextlib.nullcontext(beam_runner(given.beam_args))
    if given.beam_args:
        raise ConfigError(f"--beam-args is {given.beam_args!r} without --beam; add --beam.")
    return ProcessRunner(given.num_workers or len(os.sched_getaffinity(0)))


def main(given: Given) -> None:
    opened = _runner(given)
    experiment = experiment_from(given.config, needs_workdir=False)
    experiment, _ = with_checkpoint_model(experiment, resuming=False)
    job = PrepareJob(
        data=experiment.data,
        pack=experiment.pack,
        model=experiment.model,
        tokenizer=str(tokenizer_folder(experiment, resuming=False)),
        seed=experiment.seed,
        out=given.out,
        shard_size=given.shard_size,
        packs_per_file=given.packs_per_file,
        epochs=given.epochs,
    )
    with opened as runner:
        report = prepare(
            job, runner, packed_shards=given.packed_shards, console=Console(stderr=True)
        )
    show(report, Console())


if __name__ == "__main__":
    run(main, _define_flags, config=True)
