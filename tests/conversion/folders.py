"""Hugging Face folders for the conversion tests: golden ones and random ones made here."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, models

from conversion.formats.safetensors_io import SafetensorsFolder, SafetensorsWriter, TensorSpec
from conversion.keys import Config, key_table
from ov2_jax.config.hf import model_config_to_hf
from ov2_jax.config.model import ModelConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)


def random_bits(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """Any bit pattern at all: NaNs with payloads, infinities, subnormals, negative zeros."""
    count = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(count), dtype).reshape(shape)


def write_weights(
    folder: pathlib.Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int = 10**9
) -> None:
    specs = [TensorSpec(k, v.shape, v.dtype) for k, v in tensors.items()]
    with SafetensorsWriter(folder, specs, max_shard_bytes) as writer:
        for name, value in tensors.items():
            writer.array(name)[...] = value


def raw_config(config: Config) -> dict:
    if isinstance(config, ModelConfig):
        return model_config_to_hf(config)
    return {"model_type": "onevision_encoder", "hidden_act": "gelu", **dataclasses.asdict(config)}


def make_folder(
    folder: pathlib.Path,
    config: Config,
    dtype: Callable[[str], np.dtype] = lambda key: FLOAT32,
    max_shard_bytes: int = 10**9,
) -> pathlib.Path:
    """A Hugging Face folder of random bits; `dtype` chooses by key."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw_config(config)))
    tensors = {
        entry.key: random_bits(entry.hf_shape, dtype(entry.key), seed)
        for seed, entry in enumerate(key_table(config))
    }
    write_weights(folder, tensors, max_shard_bytes)
    return folder


def tokenizer_files(folder: pathlib.Path, special: tuple[str, ...]) -> None:
    """A word-level tokenizer of 150 words and the given special tokens behind them."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(150)}, unk_token="w0"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
            }
        )
    )


QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def same_tensors(a: pathlib.Path, b: pathlib.Path) -> None:
    """Asserts equal names, dtypes, shapes and bits."""
    one, two = SafetensorsFolder(a), SafetensorsFolder(b)
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        other = two.tensors[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert one.array(name).tobytes() == two.array(name).tobytes(), name
