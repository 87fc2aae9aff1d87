"""What a config would do on a TPU slice, before anybody pays for the slice:

    python -m launch.plan --config=configs/sft_4b.py --topology=v6e:4x4 [--out=DIR] [--search]

Compiles the real train step for the slice on this machine, without a TPU. Reports whether it fits,
what it computes and sends against the least that is needed, and how long the recipe takes at best
(docs/planner.md). Fields of the config are overridden as in training: --config.mesh.context=4.
With --search it tries meshes and remat policies, one after the other. Status: 0 it fits, 1 it does
not fit or cannot work.
"""

import os

from absl import flags

from launch.planner.libtpu import use_cpu_only
from ov2_jax.core.program import run


def define_flags() -> None:
    flags.DEFINE_string("topology", None, "The slice, as v5p:4x4x8.")
    flags.DEFINE_string("out", None, "A folder for plan.json and plan.html.")
    flags.DEFINE_bool("search", False, "Try meshes and remat policies, and rank them.")
    flags.DEFINE_integer("candidates", 12, "The most that --search compiles.", lower_bound=1)
    flags.DEFINE_integer("sample", None, "Tokens of a sample, instead of a clip's.", lower_bound=1)
    flags.DEFINE_integer(
        "window", None, "Patches of an attention window, instead of a clip's.", lower_bound=1
    )
    flags.mark_flag_as_required("topology")


if __name__ == "__main__":
    use_cpu_only(
        os.environ
    )  # before JAX is imported, which would look for a TPU if libtpu is there

    from launch.planner.command import main

    run(main, define_flags, config=True)
