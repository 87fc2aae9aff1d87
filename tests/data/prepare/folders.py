"""Prepared folders of small data sets, for tests."""

import io
from pathlib import Path

from rich.console import Console

from ov2_jax.config.pack import PackConfig
from ov2_jax.data.prepare.job import PrepareJob
from ov2_jax.data.prepare.run import prepare
from ov2_jax.data.prepare.runners import ProcessRunner
from tests.tiny import PROCESSOR, data_config, tiny_model

PACK = PackConfig(rows=2, seq_len=256, vision_rows=((4, 64), (2, 128)))
# For tests.data.loader.test_loader.write_data: some of its samples are rejected.
CONFIG = {"max_reject_share": 0.3, "num_frames": 6}


def job_of(path: Path, out: Path, *, pack: PackConfig = PACK, **changes) -> PrepareJob:
    """Changes are fields of PrepareJob, or of the data's config."""
    own = {name: changes.pop(name) for name in list(changes) if name in PrepareJob._fields}
    own = {"tokenizer": str(PROCESSOR / "tokenizer"), "seed": 7, "shard_size": 8} | own
    data = data_config(path, **CONFIG | changes)
    return PrepareJob(data=data, pack=pack, model=tiny_model(), out=str(out), **own)


def prepared(path: Path, out: Path, *, workers: int = 1, packed: bool = False, **changes) -> dict:
    """The report."""
    with ProcessRunner(workers) as runner:
        job = job_of(path, out, **changes)
        return prepare(job, runner, packed_shards=packed, console=Console(file=io.StringIO()))


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its place in the folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
