"""Reads and writes a model's config as a Hugging Face config.json (transformers 4 or 5)."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from ov2_jax.config.model import MOE_FIELDS, ModelConfig, TextConfig, VisionConfig
from ov2_jax.core.errors import ConfigError

# model_type of a full model -> that of its text_config.
FULL_MODEL_TYPES = {"llava_onevision2": "qwen3", "llava_onevision2_moe": "qwen3_moe"}
ENCODER_MODEL_TYPE = "onevision_encoder"


def _take(raw: Mapping[str, Any], cls: type, where: str, **given: Any) -> Any:
    """Builds `cls` from the fields that `raw` has; it must have those without a default."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {k: raw[k] for k in fields if k in raw and raw[k] is not None} | given
    missing = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")
    return cls(**values)


def _only(raw: Mapping[str, Any], where: str, **allowed: Any) -> None:
    """Raises ConfigError for a value that this package does not compute."""
    for name, values in allowed.items():
        if name in raw and raw[name] not in values:
            raise ConfigError(
                f"{where}.{name} is {raw[name]!r}, which is not supported; "
                f"it must be one of {[v for v in values if v is not None]}."
            )


def _rope_theta(raw: Mapping[str, Any], where: str) -> dict[str, float]:
    """transformers 4 has `rope_theta`, transformers 5 `rope_parameters.rope_theta`."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where} asks for RoPE of type {kind!r}; only 'default' is supported.")
    theta = parameters.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ConfigError(f"{where} has neither rope_theta nor rope_parameters.rope_theta.")
    return {"rope_theta": float(theta)}


def vision_config_from_hf(raw: Mapping[str, Any], where: str = "vision_config") -> VisionConfig:
    """`raw` is a `vision_config`, or the whole config.json of a standalone encoder."""
    _only(raw, where, hidden_act=("gelu",), temporal_patch_size=(1, None))
    # The reference's defaults for missing keys, if they differ from ours.
    standalone = where != "vision_config"
    missing = {"use_head": standalone, "spatial_merge_size": 2 if standalone else 3}
    defaults = {k: v for k, v in missing.items() if raw.get(k) is None}
    return _take(raw, VisionConfig, where, **defaults)


def model_config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """`raw` is the parsed config.json of a full model; raises ConfigError for other models."""
    kind = raw.get("model_type")
    if kind not in FULL_MODEL_TYPES:
        raise ConfigError(
            f"config.json has model_type {kind!r}; a LLaVA-OneVision-2 model has "
            f"{' or '.join(FULL_MODEL_TYPES)}."
        )
    text = raw["text_config"]
    _only(
        {"model_type": FULL_MODEL_TYPES[kind]} | text,
        "text_config",
        model_type=(FULL_MODEL_TYPES[kind],),
        hidden_act=("silu", None),
        attention_bias=(False, None),
        use_sliding_window=(False, None),
    )
    given = _rope_theta(text, "text_config")
    coefficient = 0.0
    if kind == "llava_onevision2_moe":
        given |= _moe_fields(text)
        coefficient = _aux_loss_coef(raw)
    tie = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    tokens = {
        f"{name}_token_id": raw[f"{name}_token_id"]
        for name in ("image", "video", "vision_start", "vision_end")
        if f"{name}_token_id" in raw
    }
    return ModelConfig(
        vision=vision_config_from_hf(raw["vision_config"]),
        text=_take(text, TextConfig, "text_config", **given),
        tie_word_embeddings=bool(tie),
        router_aux_loss_coef=coefficient,
        **tokens,
    )


def _moe_fields(text: Mapping[str, Any]) -> dict[str, Any]:
    """The mixture of experts in a `text_config` of transformers 4 or 5."""
    _only(text, "text_config", decoder_sparse_step=(1, None), mlp_only_layers=([], (), None))
    # transformers 4 has `num_experts`, transformers 5 `num_local_experts`.
    found = {
        name: text[name]
        for name in ("num_experts", "num_local_experts")
        if text.get(name) is not None
    }
    if len(set(found.values())) != 1:
        raise ConfigError(
            f"text_config has {found or 'neither num_experts nor num_local_experts'}; a mixture "
            "of experts needs one number of experts."
        )
    sizes = {"num_experts": next(iter(found.values()))}
    for name in ("num_experts_per_tok", "moe_intermediate_size"):
        if text.get(name) is None:
            raise ConfigError(f"text_config lacks {name}.")
        sizes[name] = text[name]
    if text.get("head_dim") is None and text.get("num_attention_heads"):
        # Qwen3 has a constant there, Qwen3-MoE has not.
        sizes["head_dim"] = text.get("hidden_size", 0) // text["num_attention_heads"]
    return sizes


def _aux_loss_coef(raw: Mapping[str, Any]) -> float:
    """The reference adds the router's loss only if the *top level* asks for router logits."""
    if not raw.get("output_router_logits"):
        return 0.0
    coefficient = raw.get("router_aux_loss_coef")
    return 0.001 if coefficient is None else float(coefficient)


def read_hf_config(folder: epath.PathLike) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face folder."""
    path = epath.Path(folder) / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder} is not a Hugging Face model folder: it has no config.json.")
    return json.loads(path.read_text())


def load_config(folder: epath.PathLike) -> ModelConfig | VisionConfig:
    """Reads a folder's config: a full model's or a standalone encoder's."""
    raw = read_hf_config(folder)
    if raw.get("model_type") == ENCODER_MODEL_TYPE:
        return vision_config_from_hf(raw, "config.json")
    return model_config_from_hf(raw)


def model_config_to_hf(config: ModelConfig, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read, for a model that was not read from one."""
    vision = dataclasses.asdict(config.vision)
    text = dataclasses.asdict(config.text)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": config.text.rope_theta}
    ids = {k: v for k, v in dataclasses.asdict(config).items() if k.endswith("_token_id")}
    router: dict[str, Any] = {}
    kind = "llava_onevision2_moe" if config.text.num_experts else "llava_onevision2"
    if config.text.num_experts:
        router = {
            "output_router_logits": config.router_aux_loss_coef > 0,
            "router_aux_loss_coef": config.router_aux_loss_coef,
        }
        text |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    else:
        for name in MOE_FIELDS:
            del text[name]
    return {
        "architectures": ["LlavaOnevision2ForConditionalGeneration"],
        "model_type": kind,
        "dtype": dtype,
        "tie_word_embeddings": config.tie_word_embeddings,
        **ids,
        **router,
        "vision_config": {
            "model_type": ENCODER_MODEL_TYPE,
            "hidden_act": "gelu",
            "temporal_patch_size": 1,
            **vision,
        },
        "text_config": {
            "model_type": FULL_MODEL_TYPES[kind],
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": config.tie_word_embeddings,
            **text,
        },
    }
