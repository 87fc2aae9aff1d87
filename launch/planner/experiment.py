"""The experiment of a plan: a config's, without the data and checkpoint of a run."""

from ml_collections import ConfigDict

from launch.accelerators import Tpu
from ov2_jax.config.build import experiment_from
from ov2_jax.config.experiment import Experiment


def experiment_to_plan(config: ConfigDict) -> Experiment:
    """Checks a config and builds its experiment; raises ConfigError.

    The planner reads no sample and no parameter, so the config need not name any.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.init_from = config.get("init_from") or "unused"
        config.tokenizer = None
        sources = tuple(dict(s) for s in config.data.get("sources") or ({},))
        config.data.sources = tuple(
            s if s.get("path") or s.get("sources") else s | {"path": "unused.jsonl"}
            for s in sources
        )
    return experiment_from(config, needs_workdir=False)


def check_slice(experiment: Experiment, tpu: Tpu) -> None:
    """Raises ConfigError if an experiment cannot work on a slice, before a compile of minutes."""
    experiment.pack.check(experiment.model)
    experiment.check_mesh(experiment.mesh.sizes(tpu.chips), 1)
