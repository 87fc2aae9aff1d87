"""The files around the weights of a Hugging Face folder: copied, and completed where they lack.

The released models are loaded through remote code (`trust_remote_code=True`). A folder that
brings no such code gets an `auto_map` that points at the released model's.
"""

import json
import pathlib
from typing import Any

import transformers
from etils import epath

from conversion.errors import ConversionError, listing
from conversion.keys import Config
from ov2_jax.config.model import ModelConfig
from ov2_jax.model.normalize import IMAGE_MEAN, IMAGE_STD

# Where remote code comes from when a folder has none of its own: the released models.
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
_PROCESSOR_CLASS = "processing_llava_onevision2.Llava_Onevision2Processor"
_ENCODER_AUTO_MAP = {
    "AutoConfig": "configuration_onevision_encoder.OneVisionEncoderConfig",
    "AutoModel": "modeling_onevision_encoder.OneVisionEncoderModel",
}

# The pixel budget of the released processor: 2 x 2 patches of 28 pixels to 2000 x 2000.
PIXELS = (4 * 28 * 28, 2000 * 2000)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
_SIDE_NAMES = ("LICENSE", "NOTICE")
_SIDE_FOLDERS = ("additional_chat_templates",)
# JSON that describes the weights' files or a PyTorch run, and so not this checkpoint.
_NOT_SIDE = (".index.json", "trainer_state.json")

SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}

# The reference's chat form: a default system prompt, and one placeholder for a medium, which the
# processor repeats. Qwen3's own template drops pictures.
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def copy_side_files(source: epath.PathLike, target: pathlib.Path) -> None:
    """Copies config, tokenizer, processor, chat template, generation config, licence and code."""
    for path in sorted(epath.Path(source).iterdir()):
        if path.is_dir():
            if path.name in _SIDE_FOLDERS:
                (target / path.name).mkdir()
                copy_side_files(path, target / path.name)
        elif path.name.endswith(_NOT_SIDE):
            continue
        elif path.name.endswith(_SIDE_SUFFIXES) or path.name in _SIDE_NAMES:
            (target / path.name).write_bytes(path.read_bytes())


def copy_tokenizer(source: epath.PathLike, target: pathlib.Path) -> None:
    """Copies what makes the tokenizer of a folder, and leaves its model's config behind."""
    for name in _TOKENIZER_FILES:
        if (path := epath.Path(source) / name).exists():
            (target / name).write_bytes(path.read_bytes())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _complete_auto_map(
    raw: dict[str, Any], wanted: dict[str, str], repository: str, folder: pathlib.Path
) -> bool:
    """Fills `raw["auto_map"]` so that every class can be found; whether anything changed."""
    given = wanted | (raw.get("auto_map") or {})
    for name, reference in given.items():
        module = str(reference).split(".")[0]
        if reference in wanted.values() and not (folder / f"{module}.py").exists():
            given[name] = f"{repository}--{reference}"
    changed = given != raw.get("auto_map")
    raw["auto_map"] = given
    return changed


def complete(
    folder: pathlib.Path,
    config: Config,
    dtype: str | None,
    *,
    pixels: tuple[int, int] = PIXELS,
) -> list[str]:
    """Makes a folder with a config.json loadable by transformers; returns the files it wrote.

    Args:
      folder: the Hugging Face folder; what it already has stays as it is.
      config: its model.
      dtype: the one dtype of all weights, recorded in config.json; None if they are mixed.
      pixels: smallest and largest area of a picture, for a preprocessor_config.json made here.
    """
    written = []
    raw = read_json(folder / "config.json")
    full = isinstance(config, ModelConfig)
    classes = _ENCODER_AUTO_MAP
    if isinstance(config, ModelConfig):
        classes = _MOE_AUTO_MAP if config.text.num_experts else _MODEL_AUTO_MAP
    changed = _complete_auto_map(
        raw,
        classes,
        MODEL_REPOSITORY if full else ENCODER_REPOSITORY,
        folder,
    )
    # Transformers 4 wrote `torch_dtype`, 5 writes `dtype`; "auto" loading goes by it.
    name = "torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"
    if dtype is not None and raw.get(name) != dtype:
        raw[name] = dtype
        changed = True
    if changed:
        write_json(folder / "config.json", raw)
        written.append("config.json")
    if full:
        written += _complete_processor(folder, config, pixels)
        written += _complete_generation(folder)
    return written


def _complete_processor(
    folder: pathlib.Path, config: ModelConfig, pixels: tuple[int, int]
) -> list[str]:
    written = []
    path = folder / "preprocessor_config.json"
    if not path.exists() and not (folder / "processor_config.json").exists():
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
        _complete_auto_map(raw, {"AutoProcessor": _PROCESSOR_CLASS}, MODEL_REPOSITORY, folder)
        write_json(path, raw)
        written.append(path.name)
    if has_tokenizer(folder) and not _chat_template(folder):
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        written.append("chat_template.jinja")
    return written


def has_tokenizer(folder: pathlib.Path) -> bool:
    return (folder / "tokenizer.json").exists()


def _chat_template(folder: pathlib.Path) -> str:
    """The chat template that transformers would use; empty if there is none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            template = read_json(folder / name).get("chat_template")
            if template:
                return str(template)
    return ""


def take_pictures(folder: pathlib.Path) -> None:
    """Replaces a language model's chat template, which drops pictures, by the reference's."""
    if SPECIAL_TOKENS["image_token_id"] not in _chat_template(folder):
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _complete_generation(folder: pathlib.Path) -> list[str]:
    path = folder / "generation_config.json"
    if path.exists() or not has_tokenizer(folder):
        return []
    # Not AutoTokenizer: it reads config.json, finds remote code and asks whether to run it.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = {
        name: token
        for name, token in (
            ("bos_token_id", tokenizer.bos_token_id),
            ("eos_token_id", tokenizer.eos_token_id),
            ("pad_token_id", tokenizer.pad_token_id),
        )
        if token is not None
    }
    write_json(path, {"do_sample": False, **ids})
    return [path.name]


def special_token_ids(folder: epath.PathLike) -> dict[str, int]:
    """The four ids that join text and vision, from the folder's tokenizer.

    Raises ConversionError naming the tokens that the tokenizer lacks.
    """
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS.values() if token not in vocabulary]
    if missing:
        raise ConversionError(
            listing(f"The tokenizer in {folder} lacks special tokens; a Qwen3 one has", missing)
        )
    return {name: vocabulary[token] for name, token in SPECIAL_TOKENS.items()}
