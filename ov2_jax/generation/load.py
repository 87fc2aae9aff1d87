"""Opens what people have: a run, a converted checkpoint, or a Hugging Face folder."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
from etils import epath
from flax import nnx

from conversion.load import load_hf_params
from ov2_jax.config.build import data_config_from
from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.data import DataConfig
from ov2_jax.config.hf import load_config
from ov2_jax.config.model import ModelConfig
from ov2_jax.core.checkpoint_dir import absolute, is_hf_folder, resolve
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.generation.generator import Generator
from ov2_jax.model.llava_onevision2 import LlavaOnevision2
from ov2_jax.training.checkpoint import restore_params


class Opened(NamedTuple):
    generator: Generator
    data: DataConfig  # how the model's media are sampled and resized


def _params(folder: epath.Path, config: ModelConfig, dtype: str) -> Any:
    if is_hf_folder(folder):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return load_hf_params(folder, dtype=dtype, sharding=sharding)[1]
    shapes = nnx.eval_shape(lambda: LlavaOnevision2(config, rngs=nnx.Rngs(0)))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding),
        nnx.to_pure_dict(nnx.state(shapes, nnx.Param)),
    )
    return restore_params(resolve(folder).params, abstract)


def _data_config(folder: epath.Path, hf: epath.Path) -> DataConfig:
    """As the run was trained, if it is one; else the sizes of preprocessor_config.json."""
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "config.json").exists() and (place / "checkpoints").exists():
            return data_config_from(json.loads((place / "config.json").read_text())["data"])
    defaults = DataConfig()
    processor = hf / "preprocessor_config.json"
    if not processor.exists():
        return defaults
    raw = json.loads(processor.read_text())
    size = raw.get("size") or {}
    found = {
        "min_pixels": raw.get("min_pixels", size.get("shortest_edge")),
        "max_pixels": raw.get("max_pixels", size.get("longest_edge")),
    }
    return dataclasses.replace(defaults, **{k: v for k, v in found.items() if v is not None})


def open_checkpoint(path: epath.PathLike, *, dtype: str = "float32") -> Opened:
    """A generator for a checkpoint, and the data settings it should be used with.

    Raises ConfigError (or CheckpointError, DataError) with one sentence on what is wrong.
    """
    folder = absolute(path)
    hf = folder if is_hf_folder(folder) else resolve(folder).require_hf()
    config = load_config(hf)
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"{path} is a standalone encoder; it cannot generate text.")
    compute = ComputeConfig(dtype=dtype, remat="none")
    generator = Generator(
        config, _params(folder, config, dtype), load_tokenizer(hf, config), compute
    )
    return Opened(generator, _data_config(folder, hf))
