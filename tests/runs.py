"""Small runs of the quickstart's config, for tests."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from ov2_jax.config.build import experiment_from
from ov2_jax.train import train

REPOSITORY = Path(__file__).parents[1]
SMALL = {
    "model.vision.num_hidden_layers": 1,
    "model.vision.hidden_size": 64,
    "model.vision.num_attention_heads": 2,
    "model.vision.out_hidden_size": 48,
    "model.text.num_hidden_layers": 1,
    "model.text.hidden_size": 48,
    "pack.rows": 1,
    "pack.vision_rows": ((3, 64),),
    "global_rows": 8,
    "data.lookahead": 16,
    "data.max_reject_share": 0.5,
}


def config_of(where: Path, data: Path, **changes) -> ConfigDict:
    config = runpy.run_path(str(REPOSITORY / "configs/quickstart.py"))["get_config"]()
    values = {"workdir": str(where), "data.sources": ({"path": str(data)},), **SMALL, **changes}
    config.update_from_flattened_dict(values)
    return config


def run(workdir: Path, data: Path, **changes) -> int:
    return train(experiment_from(config_of(workdir, data, **changes)))
