"""The sizes of the released models."""

from ov2_jax.config.model import ModelConfig, TextConfig, VisionConfig
from ov2_jax.core.errors import ConfigError

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
    """The released model of a size; `model_config("8b")` is 8B p14m2."""
    if size not in _QWEN3:
        raise ConfigError(f"The model size is {size!r}; it must be one of {', '.join(SIZES)}.")
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
