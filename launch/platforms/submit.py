"""The command line of launch.gke, launch.slurm and launch.tpu_vm."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

from absl import flags

from launch.errors import LaunchError
from launch.platforms.job import Job, load_job
from ov2_jax.core.program import Given, run


def submit_command(
    make_text: Callable[[Job], str], tool: Sequence[str], *, as_argument: bool = False
) -> None:
    """Runs the program: gives the text of the job in --job to a tool, or prints it (--dry-run).

    Ends the program with the tool's status.

    Args:
      make_text: gives a job's manifest or script; raises LaunchError.
      tool: the command that submits it.
      as_argument: whether the text is the tool's last argument; otherwise its standard input.
    """

    def main(given: Given) -> int:
        text = make_text(load_job(given.job, given.set))
        if given.dry_run:
            print(f"Would be given to `{' '.join(tool)}`:", file=sys.stderr)
            print(text, end="")
            return 0
        if shutil.which(tool[0]) is None:
            raise LaunchError(
                f"{tool[0]} is not installed here; install it, or use --dry-run to see what it "
                "would get."
            )
        if as_argument:
            return subprocess.run([*tool, text]).returncode
        return subprocess.run(tool, input=text, text=True).returncode

    run(main, _define_flags)


def _define_flags() -> None:
    flags.DEFINE_string("job", None, "A Python file that defines JOB.", required=True)
    flags.DEFINE_multi_string("set", [], "FIELD=VALUE: changes a field of the config.")
    flags.DEFINE_bool("dry-run", False, "Print what would be submitted.")
