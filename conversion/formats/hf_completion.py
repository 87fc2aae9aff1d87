"""Completes a Hugging Face folder, so transformers can load it.

The released models are loaded through remote code (`trust_remote_code=True`). A folder without that
code gets an `auto_map` that points at the released model's.
"""

from typing import Any

from etils import epath

from conversion.formats.hf_files import write_json
from conversion.formats.hf_tokenizer import (
    chat_template,
    generation_token_ids,
    has_tokenizer,
    write_chat_template,
)
from conversion.keys import Config
from ov2_jax.config.model import ModelConfig
from ov2_jax.core.files import read_json
from ov2_jax.model.normalize import IMAGE_MEAN, IMAGE_STD

# Where the remote code of a folder without its own comes from: the released models.
MODEL_REPOSITORY = "lmms-lab-encoder/LLaVA-OneVision-2-8B-Instruct"
ENCODER_REPOSITORY = "lmms-lab-encoder/onevision-encoder-large"

_MODEL_CLASS = "LlavaOnevision2ForConditionalGeneration"


def _model_auto_map(suffix: str, config: str) -> dict[str, str]:
    model = f"modeling_llava_onevision2{suffix}.{_MODEL_CLASS}"
    return {
        "AutoConfig": f"configuration_llava_onevision2{suffix}.{config}",
        "AutoModelForCausalLM": model,
        "AutoModelForImageTextToText": model,
    }


_MODEL_AUTO_MAP = _model_auto_map("", "LlavaOnevision2Config")
_MOE_AUTO_MAP = _model_auto_map("_moe", "LlavaOnevision2MoeConfig")
_PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_llava_onevision2.Llava_Onevision2Processor"}
_ENCODER_AUTO_MAP = {
    "AutoConfig": "configuration_onevision_encoder.OneVisionEncoderConfig",
    "AutoModel": "modeling_onevision_encoder.OneVisionEncoderModel",
}

# The pixel budget of the released processor: 2 x 2 patches of 28 pixels to 2000 x 2000.
PIXELS = (4 * 28 * 28, 2000 * 2000)


def complete(
    folder: epath.PathLike,
    config: Config,
    dtype: str | None,
    *,
    pixels: tuple[int, int] = PIXELS,
) -> list[str]:
    """Makes a folder with a config.json loadable by transformers; returns the files it wrote.

    Args:
      folder: the Hugging Face folder; the files and fields that it has stay as they are.
      config: its model.
      dtype: the one dtype of all weights, recorded in config.json; None if they are mixed.
      pixels: smallest and largest area of a picture, for a preprocessor_config.json made here.
    """
    folder = epath.Path(folder)
    written = []
    if _complete_config(folder, config, dtype):
        written.append("config.json")
    if isinstance(config, ModelConfig):
        processor_files = ("preprocessor_config.json", "processor_config.json")
        if not any((folder / name).exists() for name in processor_files):
            written.append(_write_processor(folder, config, pixels))
        if has_tokenizer(folder):
            if not chat_template(folder):
                written.append(write_chat_template(folder))
            if not (folder / "generation_config.json").exists():
                written.append(_write_generation(folder))
    return written


def _complete_auto_map(
    raw: dict[str, Any], wanted: dict[str, str], repository: str, folder: epath.Path
) -> None:
    """Fills `raw["auto_map"]`, so every class of `wanted` can be found."""
    found = wanted | (raw.get("auto_map") or {})
    for name, reference in found.items():
        module = str(reference).split(".")[0]
        if reference in wanted.values() and not (folder / f"{module}.py").exists():
            found[name] = f"{repository}--{reference}"
    raw["auto_map"] = found


def _complete_config(folder: epath.Path, config: Config, dtype: str | None) -> bool:
    """Completes config.json; returns whether it changed."""
    before = read_json(folder / "config.json")
    raw = dict(before)
    if isinstance(config, ModelConfig):
        classes = _MOE_AUTO_MAP if config.text.num_experts else _MODEL_AUTO_MAP
        _complete_auto_map(raw, classes, MODEL_REPOSITORY, folder)
    else:
        _complete_auto_map(raw, _ENCODER_AUTO_MAP, ENCODER_REPOSITORY, folder)
    # Transformers 4 wrote `torch_dtype`, 5 writes `dtype`; a load with dtype "auto" reads it.
    name = "torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"
    if dtype is not None:
        raw[name] = dtype
    if raw == before:
        return False
    write_json(folder / "config.json", raw)
    return True


def _write_processor(folder: epath.Path, config: ModelConfig, pixels: tuple[int, int]) -> str:
    """Writes preprocessor_config.json; returns its name."""
    raw: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": config.vision.patch_size,
        "merge_size": config.vision.spatial_merge_size,
        "temporal_patch_size": 1,
        "min_pixels": pixels[0],
        "max_pixels": pixels[1],
        "size": {"shortest_edge": pixels[0], "longest_edge": pixels[1]},
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
    }
    _complete_auto_map(raw, _PROCESSOR_AUTO_MAP, MODEL_REPOSITORY, folder)
    path = folder / "preprocessor_config.json"
    write_json(path, raw)
    return path.name


def _write_generation(folder: epath.Path) -> str:
    """Writes generation_config.json; returns its name."""
    path = folder / "generation_config.json"
    write_json(path, {"do_sample": False, **generation_token_ids(folder)})
    return path.name
