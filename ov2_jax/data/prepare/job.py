"""What prepare is asked for."""

from typing import NamedTuple

from etils import epath

from ov2_jax.config.data import DataConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.files import to_path


class PrepareJob(NamedTuple):
    """What prepare is asked for. Small, because workers get it."""

    data: DataConfig
    pack: PackConfig
    model: ModelConfig
    tokenizer: str  # folder
    seed: int
    out: str
    shard_size: int = 1024  # records
    packs_per_file: int = 32
    epochs: int = 1

    @property
    def folder(self) -> epath.Path:
        return to_path(self.out)
