"""What a model is: sizes and constants, as a Hugging Face config.json states them.

Everything is read from the checkpoint's config.json (transformers 4 or 5 form) and never assumed:
theta, eps, tying and merge size differ between the released models.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

# model_type of a full model -> that of its text_config.
FULL_MODEL_TYPES = {"llava_onevision2": "qwen3", "llava_onevision2_moe": "qwen3_moe"}
ENCODER_MODEL_TYPE = "onevision_encoder"


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the field, the value and the remedy."""


def _positive(owner: str, **fields: float) -> None:
    for name, value in fields.items():
        if not value > 0:
            raise ConfigError(f"{owner}.{name} must be positive, but is {value!r}.")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The OneVision-Encoder and, for the full model, the merger behind it.

    `spatial_merge_size`, `out_hidden_size` and `frame_windows_size` mean nothing to the standalone
    encoder; they sit here because the Hugging Face `vision_config` has them.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    layer_norm_type: str = "layer_norm"
    rope_theta: float = 1e4
    use_head: bool = False
    initializer_range: float = 0.02
    spatial_merge_size: int = 2
    out_hidden_size: int = 1024
    frame_windows_size: int = 4

    def __post_init__(self) -> None:
        _positive(
            "vision_config",
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_channels=self.num_channels,
            patch_size=self.patch_size,
            layer_norm_eps=self.layer_norm_eps,
            rope_theta=self.rope_theta,
            initializer_range=self.initializer_range,
            spatial_merge_size=self.spatial_merge_size,
            out_hidden_size=self.out_hidden_size,
            frame_windows_size=self.frame_windows_size,
        )
        if self.layer_norm_type not in ("layer_norm", "rms_norm"):
            raise ConfigError(
                f"vision_config.layer_norm_type is {self.layer_norm_type!r}; "
                "it must be 'layer_norm' or 'rms_norm'."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision_config.hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}."
            )
        if self.head_dim % 32:
            raise ConfigError(
                f"vision_config: hidden_size / num_attention_heads is {self.head_dim}; it must be "
                "a multiple of 32, so that half of it splits 4:6:6 between t, h and w."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch, C*p*p."""
        return self.num_channels * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that make one merged token, m*m."""
        return self.spatial_merge_size**2


# Fields of TextConfig that only a mixture of experts has.
_MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The Qwen3 decoder: dense, or with `num_experts` a mixture of experts in every layer.

    The experts' MLPs have `moe_intermediate_size`; `intermediate_size` then means nothing and sits
    here because the Hugging Face `text_config` has it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    initializer_range: float = 0.02  # standard deviation of matrices in a model made from nothing
    num_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False  # weights of a token's experts are made to sum to 1

    def __post_init__(self) -> None:
        fields = dataclasses.asdict(self)
        moe = {name: fields.pop(name) for name in _MOE_FIELDS}
        _positive("text_config", **fields)
        del moe["norm_topk_prob"]
        if any(moe.values()):
            _positive("text_config", **moe)
            if self.num_experts_per_tok > self.num_experts:
                raise ConfigError(
                    f"text_config.num_experts_per_tok {self.num_experts_per_tok} is more than "
                    f"num_experts {self.num_experts}."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"text_config.num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"text_config.head_dim {self.head_dim} must be even for RoPE.")

    @property
    def active_intermediate_size(self) -> int:
        """Width of the MLPs that one token goes through in a layer, all of them together."""
        if self.num_experts:
            return self.num_experts_per_tok * self.moe_intermediate_size
        return self.intermediate_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """LLaVA-OneVision-2: encoder, merger and decoder, and the token ids that join them."""

    vision: VisionConfig
    text: TextConfig
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    router_aux_loss_coef: float = 0.0  # of the load-balancing loss of a mixture of experts

    def __post_init__(self) -> None:
        if self.router_aux_loss_coef < 0:
            raise ConfigError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}; it must not be negative."
            )
        if self.router_aux_loss_coef and not self.text.num_experts:
            raise ConfigError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, but a dense decoder has no "
                "router; leave it at 0."
            )
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"vision_config.out_hidden_size {self.vision.out_hidden_size} must equal "
                f"text_config.hidden_size {self.text.hidden_size}: the merger writes into the text."
            )
        for name in ("image", "video", "vision_start", "vision_end"):
            token = getattr(self, f"{name}_token_id")
            if not 0 <= token < self.text.vocab_size:
                raise ConfigError(
                    f"{name}_token_id {token} lies outside the vocabulary of "
                    f"{self.text.vocab_size} tokens."
                )


# Decoders of the released family, all with a 151936-token vocabulary, untied heads and head size
# 128 (SPEC: sizes as in the public reference's model table).
_QWEN3 = {
    "2b": (28, 2048, 6144, 16, 8, 1e6),
    "4b": (36, 2560, 9728, 32, 8, 5e6),
    "8b": (36, 4096, 12288, 32, 8, 8e6),
    "14b": (40, 5120, 17408, 40, 8, 1e6),
    "32b": (64, 5120, 25600, 64, 8, 1e6),
    "30b-a3b": (48, 2048, 6144, 32, 4, 1e7),
}
_MOE = {
    "30b-a3b": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    }
}
SIZES = tuple(_QWEN3)


def model_config(size: str, *, patch_size: int = 14, merge_size: int = 2) -> ModelConfig:
    """The released model of a size, e.g. `model_config("8b")` is 8B p14m2."""
    if size not in _QWEN3:
        raise ConfigError(f"Unknown model size {size!r}; there are {', '.join(SIZES)}.")
    layers, width, mlp, heads, kv_heads, theta = _QWEN3[size]
    return ModelConfig(
        vision=VisionConfig(
            patch_size=patch_size, spatial_merge_size=merge_size, out_hidden_size=width
        ),
        text=TextConfig(
            vocab_size=151936,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rope_theta=theta,
            **_MOE.get(size, {}),
        ),
        router_aux_loss_coef=0.001 if size in _MOE else 0.0,
    )


# --- Hugging Face config.json ---------------------------------------------------------------------


def _take(raw: Mapping[str, Any], cls: type, where: str, **given: Any) -> Any:
    """Builds `cls` from the fields that `raw` has; fields without a default must be there."""
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
    """Refuses what this package does not compute, instead of computing something else."""
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
    # What the reference's config classes fill in for a missing key, where it isn't our default.
    standalone = where != "vision_config"
    missing = {"use_head": standalone, "spatial_merge_size": 2 if standalone else 3}
    defaults = {k: v for k, v in missing.items() if raw.get(k) is None}
    return _take(raw, VisionConfig, where, **defaults)


def model_config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """`raw` is the parsed config.json of a full model; raises ConfigError if it is another's."""
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
    """The reference adds the router's loss only where the *top level* asks for router logits."""
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
    """A config.json for a model that came from none, in a form both transformers 4 and 5 read."""
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
        for name in _MOE_FIELDS:
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
