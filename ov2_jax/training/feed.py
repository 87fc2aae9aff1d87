"""From a process's packs to arrays over the whole mesh."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Shaped

from ov2_jax.core.batch import Batch
from ov2_jax.core.errors import ConfigError
from ov2_jax.sharding.mesh import PACK_AXES, data_shards
from ov2_jax.sharding.rules import batch_shardings, token_order


class Feed(NamedTuple):
    """Which packs of a step a process reads.

    A pack that is cut over devices of several processes (context or tensor axes that reach beyond a
    host) is read by each of them: they have the same `index`.
    """

    mesh: Mesh
    index: int  # this process's share of the packs
    count: int  # shares
    shards: tuple[int, ...]  # data shards of the mesh that this process has devices of


def make_feed(mesh: Mesh) -> Feed:
    """The share of this process.

    Raises ConfigError if processes would share some of their packs and not others.
    """
    owners = np.vectorize(lambda d: d.process_index)(mesh.devices).reshape(data_shards(mesh), -1)
    held: dict[int, tuple[int, ...]] = {}
    for process in np.unique(owners):
        held[int(process)] = tuple(int(i) for i in np.flatnonzero((owners == process).any(1)))
    shares = sorted(set(held.values()))
    if sum(map(len, shares)) != data_shards(mesh) or len({len(s) for s in shares}) != 1:
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: its {data_shards(mesh)} data shards "
            f"({' x '.join(PACK_AXES)}) do not divide over the {len(held)} processes; choose axes "
            "so that a process has whole shards, or a shard whole processes."
        )
    here = held[jax.process_index()]
    return Feed(mesh, shares.index(here), len(shares), here)


def to_devices(batch: Batch, feed: Feed, grad_accum: int) -> Batch:
    """This process's packs [packs ...] as global arrays [A G ...], cut over the mesh.

    The tokens of a row are put in the order that balances the context axis.
    """
    shardings = batch_shardings(feed.mesh, len(batch.vision))
    packs = len(batch.tokens) // grad_accum  # of this process in a micro-step
    each = packs // len(feed.shards)
    order = token_order(batch.tokens.shape[-1], feed.mesh.shape["context"])

    def place(
        x: Shaped[np.ndarray, "packs ..."], sharding: NamedSharding
    ) -> Shaped[Array, "A G ..."]:
        x = x.reshape(grad_accum, packs, *x.shape[1:])
        shape = (grad_accum, packs * feed.count, *x.shape[2:])

        def part(index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
            shard = (index[1].start or 0) // each
            first = feed.shards.index(shard) * each
            return x[(index[0], slice(first, first + each), *index[2:])]

        return jax.make_array_from_callback(shape, sharding, part)

    text = [x[..., order] for x in batch[:-1]]
    # The one transfer that is meant; with several processes JAX counts it as an implicit one.
    with jax.transfer_guard("allow"):
        return jax.tree.map(place, Batch(*text, batch.vision), shardings)
