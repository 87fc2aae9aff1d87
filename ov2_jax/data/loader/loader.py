"""The data of a training run on one host: batches, counts, and a state to resume from.

Grain reads and encodes samples; this package packs them. The samples of a pack are chosen from
those that wait in memory (lookahead.py), or a plan of the whole corpus names them (planned.py).
Placement, counting and the treatment of rejected samples are the same.
"""

from functools import partial
from pathlib import Path
from typing import Any

import grain
from etils import epath

from ov2_jax.config.data import DataConfig, leaves
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.encoding.tokenizer import Tokenizer
from ov2_jax.data.loader.counts import LoaderCounts
from ov2_jax.data.loader.lookahead import LookaheadIterator
from ov2_jax.data.loader.planned import PlannedIterator, open_planned
from ov2_jax.data.loader.workers import steps_ahead
from ov2_jax.data.rejected import RejectLog
from ov2_jax.data.sources.mixture import Mixture


def make_loader(
    data: DataConfig,
    pack: PackConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    packs_per_step: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    rejects_path: epath.PathLike,
) -> grain.DatasetIterator:
    """An endless iterator over (Batch with the axis G = packs_per_step / process_count, StepInfo).

    Every epoch has an order of its own (unless `data.shuffle` is off), which is equal on all
    processes. Each process takes its share: without a plan every process_count-th sample, with a
    plan its part of the packs of a step. `get_state` describes the steps that were taken, not those
    that were made ahead. The state is small JSON and works with grain.checkpoint; if the number of
    processes changes, see resume.share_state. Close the iterator when done.

    Rejected samples are appended to `rejects_path`. If there are several processes, each writes a
    file of its own (`rejected.jsonl` becomes `rejected-00003.jsonl`). Raises ConfigError, and
    DataError if the data or the plan cannot be used or too many samples are rejected.
    """
    if packs_per_step <= 0 or packs_per_step % process_count:
        raise ConfigError(
            f"packs_per_step is {packs_per_step}; it must be a positive multiple of the "
            f"{process_count} processes."
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index {process_index} is not one of {process_count} processes.")
    rejects_path = Path(rejects_path)
    if process_count > 1:
        name = f"{rejects_path.stem}-{process_index:05d}{rejects_path.suffix}"
        rejects_path = rejects_path.with_name(name)
    encoder = SampleEncoder(data, model, tokenizer, pack, seed=seed)
    log = RejectLog(rejects_path)
    if data.plan is not None:
        opened = open_planned(data, pack, model, tokenizer, encoder, seed)
        info = opened.plan.info
        names = [source.title for source in leaves(data.sources)]
        epoch = -(-(info.samples // len(info.epochs)) // process_count)
        counts = LoaderCounts(data, names, epoch, log)
        identity: dict[str, Any] = {"plan": info.digest, "shuffle": data.shuffle, "seed": seed}
        return steps_ahead(
            partial(
                PlannedIterator,
                opened,
                data,
                pack,
                model,
                packs_per_step,
                process_index,
                process_count,
                counts,
                identity,
            )
        )
    mixture = Mixture(data.sources, seed=seed, shuffle=data.shuffle)
    samples = grain.MapDataset.source(mixture)[process_index::process_count].map(encoder)
    counts = LoaderCounts(data, mixture.names, -(-mixture.epoch // process_count), log)
    identity = {
        "plan": None,
        "samples": mixture.epoch,
        "samples_by_source": list(mixture.draws),
        "shuffle": data.shuffle,
        "seed": seed,
        "process_index": process_index,
        "process_count": process_count,
    }
    packs = packs_per_step // process_count
    return steps_ahead(
        partial(LookaheadIterator, samples, data, pack, model, packs, counts, identity)
    )
