"""The tokenizer of a Hugging Face folder: its special tokens and its chat template."""

import transformers
from etils import epath

from conversion.errors import ConversionError, listing
from ov2_jax.core.files import read_json

# By the name that config.json has for the id.
SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}

# The reference's chat template: a default system prompt, and one placeholder per picture or clip,
# which the processor repeats. Qwen3's own template drops pictures.
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


def has_tokenizer(folder: epath.PathLike) -> bool:
    return (epath.Path(folder) / "tokenizer.json").exists()


def _load(folder: epath.PathLike) -> transformers.PreTrainedTokenizerFast:
    if not has_tokenizer(folder):
        raise ConversionError(f"{folder} has no tokenizer: there is no tokenizer.json.")
    # Not AutoTokenizer: it reads config.json, finds remote code and asks whether to run it.
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


def special_token_ids(folder: epath.PathLike) -> dict[str, int]:
    """The four ids that join text and vision, from the folder's tokenizer.

    Raises ConversionError if there is no tokenizer, and with a list of the tokens that it lacks.
    """
    vocabulary = _load(folder).get_vocab()
    missing = [token for token in SPECIAL_TOKENS.values() if token not in vocabulary]
    if missing:
        raise ConversionError(
            listing(f"The tokenizer in {folder} lacks special tokens that Qwen3's has", missing)
        )
    return {name: vocabulary[token] for name, token in SPECIAL_TOKENS.items()}


def generation_token_ids(folder: epath.PathLike) -> dict[str, int]:
    """The ids of the tokenizer that generation_config.json has, without those it lacks."""
    tokenizer = _load(folder)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {name: token for name, token in ids.items() if token is not None}


def chat_template(folder: epath.PathLike) -> str:
    """The chat template that transformers would use; empty if there is none."""
    folder = epath.Path(folder)
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            template = read_json(folder / name).get("chat_template")
            if template:
                return str(template)
    return ""


def write_chat_template(folder: epath.PathLike) -> str:
    """Writes the reference's chat template; returns the file's name."""
    path = epath.Path(folder) / "chat_template.jinja"
    path.write_text(CHAT_TEMPLATE)
    return path.name
