"""The program: python -m ov2_jax.data.inspect --config=configs/X.py --out=report.html"""

import shlex
import sys

import jax
from absl import flags

from ov2_jax.config.build import experiment_from
from ov2_jax.config.start import tokenizer_folder, with_checkpoint_model
from ov2_jax.core.files import size
from ov2_jax.core.program import Given, run
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.data.inspect.inspect import check_out, inspect_data, write_page


def _define_flags() -> None:
    flags.DEFINE_string("out", None, "The page to write, an .html file.")
    flags.DEFINE_integer("count", 1000, "Samples to pack; at most an epoch.", lower_bound=1)
    flags.DEFINE_integer("samples", 24, "Samples to show with pictures.", lower_bound=0)
    flags.mark_flag_as_required("out")


def main(given: Given) -> None:
    jax.config.update("jax_platforms", "cpu")  # a training run may use the accelerator
    path = check_out(given.out)
    experiment = experiment_from(given.config, needs_workdir=False)
    experiment, _ = with_checkpoint_model(experiment, resuming=False)
    folder = tokenizer_folder(experiment, resuming=False)
    page = inspect_data(
        experiment,
        load_tokenizer(folder, experiment.model),
        count=given.count,
        samples=given.samples,
        title=given.config_file.stem,
        command=shlex.join(["python", "-m", "ov2_jax.data.inspect", *sys.argv[1:]]),
    )
    write_page(page, path)
    print(f"{path}: {size(path) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main, _define_flags, config=True)
