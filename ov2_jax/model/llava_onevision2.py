"""LLaVA-OneVision-2: encoder, merger and decoder over a packed batch."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.core.batch import Batch, VisionRows
from ov2_jax.model.decoder import Collected, Decoder
from ov2_jax.model.encoder import VisionEncoder
from ov2_jax.model.merger import Merger
from ov2_jax.model.normalize import normalize_patches
from ov2_jax.sharding.exchange import gather_vision


class LlavaOnevision2(nnx.Module):
    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None
    ) -> None:
        self.config = config
        self.encoder = VisionEncoder(config.vision, rngs=rngs, compute=compute)
        self.merger = Merger(config.vision, rngs=rngs)
        self.decoder = Decoder(
            config.text,
            tie_word_embeddings=config.tie_word_embeddings,
            rngs=rngs,
            compute=compute,
        )

    def merged_tokens(self, vision: tuple[VisionRows, ...]) -> Float[Array, "G M D"]:
        """The merged tokens of each pack, from all classes of its vision rows.

        Every device encodes its own vision rows, on any axis of the mesh.
        """
        packs = vision[0].patches.shape[0]
        patches = jnp.concatenate([x.patches.reshape(-1, x.patches.shape[-1]) for x in vision])
        positions = jnp.concatenate([x.patch_positions.reshape(-1, 3) for x in vision])
        segments = [x.segment_ids.reshape(-1, x.segment_ids.shape[-1]) for x in vision]
        features, _ = self.encoder(normalize_patches(patches), positions, segments)
        tokens = self.merger(features)  # of all classes' rows, one after the other
        ends = np.cumsum([x.size for x in segments]) // self.config.vision.merge_unit
        merged = [
            gather_vision(x.reshape(packs, -1, x.shape[-1])) for x in jnp.split(tokens, ends[:-1])
        ]  # of each class G R*W/m^2 D
        return jnp.concatenate(merged, 1)

    def embed(self, batch: Batch) -> Float[Array, "B L D"]:
        """Token embeddings, with merged tokens in their places, of the G*B rows of all packs."""
        packs, rows, length = batch.tokens.shape
        text = self.decoder.embed(batch.tokens.reshape(-1, length))
        if not batch.vision:
            return text
        index = batch.vision_index.reshape(packs, -1)
        # A gather inside each pack: packs lie on different devices and never mix.
        picked = jax.vmap(lambda tokens, i: tokens[i])(
            self.merged_tokens(batch.vision), jnp.maximum(index, 0)
        ).reshape(text.shape)
        is_vision = (batch.vision_index >= 0).reshape(-1, length, 1)
        return jnp.where(is_vision, picked, text)

    def __call__(
        self, batch: Batch, *, collect_cache: bool = False
    ) -> tuple[Float[Array, "B L D"], Collected]:
        """Hidden states after the final norm, of the G*B rows of all packs, and what the decoder's
        layers collected."""
        positions, segments = (
            x.reshape(-1, x.shape[-1]) for x in (batch.positions, batch.segment_ids)
        )
        return self.decoder(self.embed(batch), positions, segments, collect_cache=collect_cache)
