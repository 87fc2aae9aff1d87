"""The one table between Hugging Face keys and our parameters.

Our arrays stack the layers on axis 0, and those of a mixture's experts on axis 1 behind it. They
hold kernels as [I O], input width first. Hugging Face has one tensor per layer and expert, and
kernels as [O I].

Each entry of the table maps one Hugging Face tensor to a part of one of our arrays. Both shapes
follow from the config alone, so a checkpoint can be checked, counted and laid out without reading
any data. `as_ours` returns a *view* of a Hugging Face tensor in our orientation: reading from the
view converts one way, writing into it the other, so neither direction has code of its own.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped

from ov2_jax.config.model import ModelConfig, TextConfig, VisionConfig

ParamPath = tuple[str, ...]
Shape = tuple[int, ...]
Config = ModelConfig | VisionConfig


class Transform(enum.Enum):
    """How a Hugging Face tensor turns into ours (before stacking and concatenation)."""

    NONE = "none"
    TRANSPOSE = "transpose"  # [O I] -> [I O]
    PATCHES = "patches"  # [D C p p] -> [D C*p*p] -> [C*p*p D]

    def shape(self, hf: Shape) -> Shape:
        """The shape in our orientation of a tensor of shape `hf`."""
        if self is Transform.TRANSPOSE:
            return hf[1], hf[0]
        if self is Transform.PATCHES:
            return math.prod(hf[1:]), hf[0]
        return hf


@dataclasses.dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor and its place in our leaf."""

    key: str
    hf_shape: Shape
    path: ParamPath
    lead: tuple[int, ...]  # indices on the leaf's first axes: (layer,), (layer, expert) or none
    transform: Transform
    part: int = 0  # which of `parts` equal pieces along the last axis
    parts: int = 1

    @property
    def shape(self) -> Shape:
        """Shape of this tensor in our orientation, without the leaf's leading axes."""
        return self.transform.shape(self.hf_shape)

    @property
    def last_axis(self) -> slice:
        """Where this tensor lies on the leaf's last axis."""
        width = self.shape[-1]
        return slice(self.part * width, (self.part + 1) * width)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our parameters and the Hugging Face tensors that it is made of."""

    path: ParamPath
    shape: Shape
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def lead(self) -> Shape:
        """Sizes of the leading axes, along which Hugging Face tensors are stacked."""
        return self.shape[: len(self.entries[0].lead)]

    @functools.cached_property
    def by_lead(self) -> dict[tuple[int, ...], list[Entry]]:
        """The entries at each place of the leading axes."""
        found: dict[tuple[int, ...], list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.lead, []).append(entry)
        return found

    @property
    def split_axis(self) -> int:
        """Our axis that is axis 0 of the Hugging Face tensors."""
        first = self.entries[0]
        return len(self.shape) - (1 if first.transform is not Transform.NONE else len(first.shape))


def as_ours(
    entry: Entry, tensor: Shaped[np.ndarray, "*hf_shape"]
) -> Shaped[np.ndarray, "*our_shape"]:
    """A view of the Hugging Face `tensor` in our orientation, `entry.shape`."""
    if entry.transform is Transform.NONE:
        return tensor
    return tensor.reshape(entry.hf_shape[0], -1).T


# --- the table ------------------------------------------------------------------------------------

# (rest of the key, Hugging Face shape, rest of our path, transform)
_Row = tuple[str, Shape, str, Transform]


def _norm(key: str, ours: str, width: int, *, bias: bool) -> list[_Row]:
    rows = [(f"{key}.weight", (width,), f"{ours}.scale", Transform.NONE)]
    if bias:
        rows.append((f"{key}.bias", (width,), f"{ours}.bias", Transform.NONE))
    return rows


def _linear(key: str, ours: str, n_in: int, n_out: int, *, bias: bool) -> list[_Row]:
    rows = [(f"{key}.weight", (n_out, n_in), f"{ours}.kernel", Transform.TRANSPOSE)]
    if bias:
        rows.append((f"{key}.bias", (n_out,), f"{ours}.bias", Transform.NONE))
    return rows


def _entry(
    row: _Row, prefix: str, root: str, lead: tuple[int, ...], part: int = 0, parts: int = 1
) -> Entry:
    key, shape, ours, transform = row
    path = (*root.split("."), *ours.split("."))
    return Entry(prefix + key, shape, path, lead, transform, part, parts)


def _rows(rows: list[_Row], prefix: str, root: str, *lead: int) -> Iterator[Entry]:
    for row in rows:
        yield _entry(row, prefix, root, lead)


def _encoder(config: VisionConfig, prefix: str, *, standalone: bool) -> Iterator[Entry]:
    width, mlp = config.hidden_size, config.intermediate_size
    bias = config.layer_norm_type == "layer_norm"
    patch = (width, config.num_channels, config.patch_size, config.patch_size)
    yield from _rows(
        [
            (
                "embeddings.patch_embedding.weight",
                patch,
                "patch_embedding.kernel",
                Transform.PATCHES,
            ),
            *_norm("layernorm_pre", "layernorm_pre", width, bias=bias),
        ],
        prefix,
        "encoder",
    )
    for i in range(config.num_hidden_layers):
        where = f"{prefix}encoder.layers.{i}."
        yield from _rows(
            _norm("layer_norm1", "layer_norm1", width, bias=bias), where, "encoder.layers", i
        )
        if standalone:  # three projections; ours has query, key and value along the last axis
            for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
                for row in _linear(f"self_attn.{name}", "attn.qkv", width, width, bias=True):
                    yield _entry(row, where, "encoder.layers", (i,), part, 3)
            out = _linear("self_attn.out_proj", "attn.proj", width, width, bias=True)
        else:
            out = [
                *_linear("self_attn.qkv", "attn.qkv", width, 3 * width, bias=True),
                *_linear("self_attn.proj", "attn.proj", width, width, bias=True),
            ]
        yield from _rows(
            [
                *out,
                *_norm("layer_norm2", "layer_norm2", width, bias=bias),
                *_linear("mlp.fc1", "mlp.fc1", width, mlp, bias=True),
                *_linear("mlp.fc2", "mlp.fc2", mlp, width, bias=True),
            ],
            where,
            "encoder.layers",
            i,
        )
    if config.use_head:
        yield from _rows(
            [
                *_norm("layernorm_post", "layernorm_post", width, bias=bias),
                ("head.probe", (1, 1, width), "head.probe", Transform.NONE),
                (
                    "head.attention.in_proj_weight",
                    (3 * width, width),
                    "head.attn.qkv.kernel",
                    Transform.TRANSPOSE,
                ),
                ("head.attention.in_proj_bias", (3 * width,), "head.attn.qkv.bias", Transform.NONE),
                *_linear("head.attention.out_proj", "head.attn.proj", width, width, bias=True),
                *_norm("head.norm", "head.norm", width, bias=False),
                *_linear("head.mlp.fc1", "head.mlp.fc1", width, mlp, bias=True),
                *_linear("head.mlp.fc2", "head.mlp.fc2", mlp, width, bias=True),
            ],
            prefix,
            "encoder",
        )


def _merger(config: VisionConfig) -> Iterator[Entry]:
    block = config.hidden_size * config.merge_unit
    yield from _rows(
        [
            *_norm("ln_q", "ln_q", config.hidden_size, bias=True),
            *_linear("mlp.0", "fc1", block, block, bias=True),
            *_linear("mlp.2", "fc2", block, config.out_hidden_size, bias=True),
        ],
        "model.visual.merger.",
        "merger",
    )


def _feed_forward(text: TextConfig, prefix: str, layer: int) -> Iterator[Entry]:
    def swiglu(width: int) -> list[_Row]:
        return [
            *_linear("gate_proj", "gate_proj", text.hidden_size, width, bias=False),
            *_linear("up_proj", "up_proj", text.hidden_size, width, bias=False),
            *_linear("down_proj", "down_proj", width, text.hidden_size, bias=False),
        ]

    root = "decoder.layers.mlp"
    if not text.num_experts:
        yield from _rows(swiglu(text.intermediate_size), prefix, root, layer)
        return
    router = _linear("gate", "gate", text.hidden_size, text.num_experts, bias=False)
    yield from _rows(router, prefix, root, layer)
    for expert in range(text.num_experts):
        rows = swiglu(text.moe_intermediate_size)
        yield from _rows(rows, f"{prefix}experts.{expert}.", f"{root}.experts", layer, expert)


def _decoder(config: ModelConfig) -> Iterator[Entry]:
    text = config.text
    width = text.hidden_size
    query = text.num_attention_heads * text.head_dim
    key_value = text.num_key_value_heads * text.head_dim
    embedding = (text.vocab_size, width)
    prefix = "model.language_model."
    yield from _rows(
        [("embed_tokens.weight", embedding, "embed_tokens.embedding", Transform.NONE)],
        prefix,
        "decoder",
    )
    for i in range(text.num_hidden_layers):
        yield from _rows(
            [
                *_norm("input_layernorm", "input_layernorm", width, bias=False),
                *_linear("self_attn.q_proj", "attn.q_proj", width, query, bias=False),
                *_linear("self_attn.k_proj", "attn.k_proj", width, key_value, bias=False),
                *_linear("self_attn.v_proj", "attn.v_proj", width, key_value, bias=False),
                *_linear("self_attn.o_proj", "attn.o_proj", query, width, bias=False),
                *_norm("self_attn.q_norm", "attn.q_norm", text.head_dim, bias=False),
                *_norm("self_attn.k_norm", "attn.k_norm", text.head_dim, bias=False),
                *_norm("post_attention_layernorm", "post_attention_layernorm", width, bias=False),
            ],
            f"{prefix}layers.{i}.",
            "decoder.layers",
            i,
        )
        yield from _feed_forward(text, f"{prefix}layers.{i}.mlp.", i)
    yield from _rows(_norm("norm", "norm", width, bias=False), prefix, "decoder")
    if not config.tie_word_embeddings:
        head = _linear("lm_head", "lm_head", width, text.vocab_size, bias=False)
        yield from _rows(head, "", "decoder")


def key_table(config: Config) -> tuple[Entry, ...]:
    """Every Hugging Face key of the model, or of a standalone encoder for a VisionConfig."""
    if isinstance(config, VisionConfig):
        return tuple(_encoder(config, "", standalone=True))
    return (
        *_encoder(config.vision, "model.visual.", standalone=False),
        *_merger(config.vision),
        *_decoder(config),
    )


def leaves(config: Config) -> dict[ParamPath, Leaf]:
    """Our parameters by path, in the table's order."""
    grouped: dict[ParamPath, list[Entry]] = {}
    for entry in key_table(config):
        grouped.setdefault(entry.path, []).append(entry)
    result = {}
    for path, entries in grouped.items():
        *outer, last = entries[0].shape
        lead = (n + 1 for n in entries[-1].lead)  # the table's last entry is the last of each axis
        shape = (*lead, *outer, last * entries[0].parts)
        result[path] = Leaf(path, shape, tuple(entries))
    return result


def parameter_count(config: Config) -> int:
    """Parameters of the model; a tied head counts once."""
    return sum(math.prod(entry.hf_shape) for entry in key_table(config))
