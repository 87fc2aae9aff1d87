"""Model FLOPs: what the model needs for the real tokens and patches, whatever is executed.

A multiply-add is 2 FLOPs. Forward, with n real tokens, P real patches, M merged tokens:
  encoder  2 P (C p^2 D + N (4 D^2 + 2 D F))  +  sum over windows w of 4 N w^2 D
  merger   2 M ((m^2 D)^2 + m^2 D D')
  decoder  2 n (N (2 D' H K + 2 D' J K + 3 D' F') + D' V)  +  sum over samples s of 2 N s^2 H K
(attention of a causal sample sees half of the square). In a mixture of E experts F' is the width of
a token's own experts together, and its router adds 2 n N D' E. The backward pass costs one forward
pass for the gradients of activations, if the part or one before it is trained, and one for the
gradients of weights, if the part is trained: 3 forward passes if everything is trained.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from ov2_jax.config.model import ModelConfig
from ov2_jax.core.batch import Array, Batch


class Work(NamedTuple):
    """Real tokens and patches of a batch, and the sums of squares that attention costs."""

    tokens: int
    patches: int
    squared_samples: int
    squared_windows: int


def _segments(ids: Int32[Array, "*rows length"]) -> tuple[int, int]:
    """(real elements, sum over segments of length squared)."""
    rows = np.asarray(ids).reshape(-1, ids.shape[-1]).astype(np.int64)
    row_base = np.arange(rows.shape[0])[:, None] * (rows.max(initial=0) + 1)
    lengths = np.bincount((rows + row_base)[rows > 0])
    return int(lengths.sum()), int((lengths.astype(np.int64) ** 2).sum())


def batch_work(batch: Batch) -> Work:
    """Counts of a host batch."""
    tokens, squared_samples = _segments(batch.segment_ids)
    vision = [_segments(rows.segment_ids) for rows in batch.vision]
    return Work(tokens, sum(p for p, _ in vision), squared_samples, sum(s for _, s in vision))


def forward_flops(config: ModelConfig, work: Work) -> dict[str, float]:
    """FLOPs of a forward pass, by part."""
    v, t = config.vision, config.text
    n, d, f = v.num_hidden_layers, v.hidden_size, v.intermediate_size
    encoder = 2 * work.patches * (v.patch_dim * d + n * (4 * d * d + 2 * d * f))
    encoder += 4 * n * work.squared_windows * d
    block = v.merge_unit * d
    merger = 2 * work.patches / v.merge_unit * (block * block + block * v.out_hidden_size)
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    layer = t.hidden_size * (2 * q + 2 * kv + 3 * t.active_intermediate_size + t.num_experts)
    per_token = t.num_hidden_layers * layer + t.hidden_size * t.vocab_size
    decoder = 2 * work.tokens * per_token
    decoder += 2 * t.num_hidden_layers * work.squared_samples * q
    return {"encoder": float(encoder), "merger": float(merger), "decoder": float(decoder)}


def train_flops(config: ModelConfig, work: Work, train: Collection[str]) -> float:
    """FLOPs of a train step that trains the parts named in `train`."""
    total, something_before = 0.0, False
    for part, forward in forward_flops(config, work).items():
        something_before |= part in train
        total += forward * (1 + (part in train) + something_before)
    return total
