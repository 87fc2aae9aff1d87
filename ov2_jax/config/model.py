"""A model's sizes and constants, named as in a Hugging Face config.json.

A checkpoint's are read from its config.json (config/hf.py) and never assumed: theta, eps, tying and
merge size differ between the released models.
"""

import dataclasses

from ov2_jax.core.errors import ConfigError


def _positive(owner: str, **fields: float) -> None:
    for name, value in fields.items():
        if not value > 0:
            raise ConfigError(f"{owner}.{name} is {value!r}; it must be positive.")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The OneVision-Encoder and, for the full model, the merger behind it.

    The standalone encoder does not use `spatial_merge_size`, `out_hidden_size` and
    `frame_windows_size`; they are here because the Hugging Face `vision_config` has them.
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
MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The Qwen3 decoder: dense, or with `num_experts` a mixture of experts in every layer.

    Experts have MLPs of `moe_intermediate_size`. A mixture of experts does not use
    `intermediate_size`, which is here because the Hugging Face `text_config` has it.
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
    norm_topk_prob: bool = False  # the weights of a token's experts are scaled to sum to 1

    def __post_init__(self) -> None:
        fields = dataclasses.asdict(self)
        moe = {name: fields.pop(name) for name in MOE_FIELDS}
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
        """Width of the MLPs that one token passes in a layer, added up."""
        if self.num_experts:
            return self.num_experts_per_tok * self.moe_intermediate_size
        return self.intermediate_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """LLaVA-OneVision-2: encoder, merger and decoder, and the token ids of media in the text."""

    vision: VisionConfig
    text: TextConfig
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    router_aux_loss_coef: float = 0.0  # factor of the load-balancing loss of a mixture of experts

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
