"""The host side of a training run's data: Grain reads and encodes, this packs, both can resume.

What a pack holds is planned for the whole corpus (planned.py) or chosen among the samples that wait
in memory (lookahead.py). Placement, counting and what becomes of bad samples are the same.
"""

from pathlib import Path
from typing import Any

import grain

from ov2_jax.config.data import DataConfig, leaves
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.encode import SampleEncoder
from ov2_jax.data.encoding.tokenizer import Tokenizer
from ov2_jax.data.loader.lookahead import LookaheadIterator
from ov2_jax.data.loader.planned import PackMaker, PackOrder, PlannedIterator
from ov2_jax.data.loader.steps import Progress, StepInfo
from ov2_jax.data.loader.workers import steps_ahead
from ov2_jax.data.plan.fingerprint import encoding_inputs
from ov2_jax.data.plan.reading import open_plan
from ov2_jax.data.rejected import RejectLog
from ov2_jax.data.sources.mixture import Mixture

__all__ = ["StepInfo", "make_loader"]


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
    rejects_path: str | Path,
) -> grain.DatasetIterator:
    """An endless iterator over (Batch with the axis G = packs_per_step / process_count, StepInfo).

    Every epoch has an order of its own (unless `data.shuffle` is off), equal on all processes, and
    each takes its share: without a plan every process_count-th sample, with one its part of the
    packs of a step. `get_state` describes what was handed out, not what was prepared ahead; it is
    small JSON and works with grain.checkpoint; see steps.share_state for other numbers of
    processes. Close the iterator when done.

    Rejected samples are appended to `rejects_path`; with several processes each writes a file of
    its own (`rejected.jsonl` becomes `rejected-00003.jsonl`). Raises ConfigError, and DataError
    when the data or the plan cannot be used or too many samples are rejected.
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
        inputs = encoding_inputs(data, model, pack, tokenizer, seed)
        plan, read = open_plan(data, inputs, encoder)
        names = [source.title for source in leaves(data.sources)]
        samples = plan.info.samples // len(plan.info.epochs)
        identity: dict[str, Any] = {
            "plan": plan.info.digest,
            "shuffle": data.shuffle,
            "seed": seed,
        }
        return steps_ahead(
            PlannedIterator,
            PackOrder(plan.info.epochs, seed=seed, shuffle=data.shuffle),
            PackMaker(plan, read, pack, model),
            data,
            pack,
            packs_per_step,
            process_index,
            process_count,
            Progress(data, names, -(-samples // process_count), log),
            identity,
        )
    mixture = Mixture(data.sources, seed=seed, shuffle=data.shuffle)
    identity = {
        "plan": None,
        "samples": mixture.epoch,
        "samples_by_source": list(mixture.draws),
        "shuffle": data.shuffle,
        "seed": seed,
        "process_index": process_index,
        "process_count": process_count,
    }
    return steps_ahead(
        LookaheadIterator,
        grain.MapDataset.source(mixture)[process_index::process_count].map(encoder),
        data,
        pack,
        model,
        packs_per_step // process_count,
        Progress(data, mixture.names, -(-mixture.epoch // process_count), log),
        identity,
    )
