"""The experiment: everything that a user can state about a run."""

import dataclasses
import importlib.util
from collections.abc import Mapping

from ov2_jax.config.compute import ComputeConfig
from ov2_jax.config.data import DataConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.optimizer import OptimizerConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.core.files import to_path
from ov2_jax.sharding.mesh import ROW_AXES, MeshConfig, axes_size, data_shards
from ov2_jax.sharding.rules import GATHERED

# The mean over all supervised tokens of a step, or over rows of each row's mean (training/loss.py).
REDUCTIONS = ("tokens", "rows")


def check_mesh(sizes: Mapping[str, int], model: ModelConfig, pack: PackConfig) -> None:
    """Raises ConfigError if an axis does not divide a size that is cut over it."""
    text, vision = model.text, model.vision
    cut: list[tuple[tuple[str, ...], str, int]] = [
        (GATHERED["embed"], "model.text.hidden_size", text.hidden_size),
        (GATHERED["width"], "model.vision.hidden_size", vision.hidden_size),
        (GATHERED["width"], "model.text.hidden_size", text.hidden_size),
        (("tensor",), "model.text.num_key_value_heads", text.num_key_value_heads),
        (("tensor",), "model.text.vocab_size", text.vocab_size),
    ]
    if text.num_experts:
        cut += [
            (("expert",), "model.text.num_experts", text.num_experts),
            (("tensor",), "model.text.moe_intermediate_size", text.moe_intermediate_size),
        ]
    else:
        cut += [(("tensor",), "model.text.intermediate_size", text.intermediate_size)]
        if sizes["expert"] > 1:
            raise ConfigError(
                f"mesh.expert is {sizes['expert']}, but a dense decoder has no experts; use fsdp."
            )
    cut += [
        (ROW_AXES, f"the number of rows of pack.vision_rows[{i}]", rows)
        for i, (rows, _) in enumerate(pack.vision_rows)
    ]
    for axes, name, size in cut:
        if size % axes_size(sizes, axes):
            what = " x ".join(f"mesh.{axis}" for axis in axes if sizes[axis] > 1)
            raise ConfigError(
                f"{what} is {axes_size(sizes, axes)}, which does not divide {name} {size}; choose "
                "sizes that do."
            )
    # Every device of the context axis has two pieces of a row, an early and a late one.
    pieces = 2 * sizes["context"] if sizes["context"] > 1 else 1
    if pack.seq_len % (pieces * sizes["tensor"]):
        raise ConfigError(
            f"pack.seq_len {pack.seq_len} does not divide into {pieces} pieces for mesh.context "
            f"{sizes['context']}, and those over mesh.tensor {sizes['tensor']}; use a multiple of "
            f"{pieces * sizes['tensor']}."
        )


def _check_profile_steps(profile_steps: tuple[int, ...], steps: int) -> None:
    """() for none, or the first and the last step of a trace; raises ConfigError."""
    if not profile_steps:
        return
    if len(profile_steps) != 2 or not 1 < profile_steps[0] <= profile_steps[1] <= steps:
        raise ConfigError(
            f"profile_steps is {profile_steps}; it must be () or (first, last) with 1 < first <= "
            f"last <= steps {steps}: the time of a run's first step is the compiler's."
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep: the newest `keep_last`, and every `keep_every`-th step."""

    every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"checkpoint.{name} is {getattr(self, name)}; it must be at least 1."
                )
        if self.keep_every is not None and self.keep_every % self.every:
            raise ConfigError(
                f"checkpoint.keep_every is {self.keep_every}; it must be a multiple of "
                f"checkpoint.every {self.every}, because only those steps are saved."
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run. configs/*.py make these, with the reasons for the values."""

    workdir: str
    model: ModelConfig
    data: DataConfig
    pack: PackConfig
    steps: int
    global_rows: int  # text rows of an optimizer step, over all devices and micro-steps
    init_from: str | None = None  # a converted checkpoint or a work directory; None: random
    tokenizer: str | None = None  # a folder; None: the tokenizer of `init_from`
    seed: int = 0
    grad_accum: int = 1  # micro-steps of an optimizer step
    loss_reduction: str = "tokens"
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    max_skipped_in_a_row: int = 5  # non-finite steps before the run stops
    profile_steps: tuple[int, ...] = ()  # (first, last): traced into WORKDIR/profile
    wandb_project: str | None = None
    distributed: bool = False  # join jax.distributed before anything else

    def __post_init__(self) -> None:
        if not self.workdir:
            raise ConfigError("workdir is empty; set --config.workdir=DIR, where the run is kept.")
        if "://" in self.workdir:
            raise ConfigError(
                f"workdir is {self.workdir!r}; it must be a folder of a file system, because "
                "metrics are appended to: mount the bucket (gcsfuse, mountpoint-s3)."
            )
        if not self.data.sources:
            raise ConfigError("data.sources is (); name at least one data set (docs/data.md).")
        if self.init_from is None and self.tokenizer is None:
            raise ConfigError("Set init_from (a checkpoint) or tokenizer (a folder), or both.")
        for name in ("steps", "global_rows", "grad_accum", "max_skipped_in_a_row"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        _check_profile_steps(self.profile_steps, self.steps)
        if self.loss_reduction not in REDUCTIONS:
            raise ConfigError(
                f"loss_reduction is {self.loss_reduction!r}; it must be one of {REDUCTIONS}."
            )
        if self.global_rows % self.pack.rows:
            raise ConfigError(
                f"global_rows {self.global_rows} is not a multiple of pack.rows "
                f"{self.pack.rows}, the text rows of a pack."
            )
        if self.wandb_project is not None and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"wandb_project is {self.wandb_project!r} but wandb is not installed; "
                "pip install 'ov2_jax[wandb]'."
            )
        if self.tokenizer is not None and not to_path(self.tokenizer).exists():
            raise ConfigError(f"tokenizer is {self.tokenizer!r}, which does not exist.")

    @property
    def packs_per_step(self) -> int:
        return self.global_rows // self.pack.rows

    def check_mesh(self, sizes: Mapping[str, int], shares: int) -> None:
        """Raises ConfigError if the mesh does not divide the model or the pack, or if micro-steps
        and data shards do not divide the global batch, or `shares` the data shards.

        `sizes`: devices along each axis. `shares`: parts of the batch that processes read.
        """
        check_mesh(sizes, self.model, self.pack)
        shards = data_shards(sizes)
        if self.packs_per_step % (self.grad_accum * shards):
            raise ConfigError(
                f"global_rows {self.global_rows} makes {self.packs_per_step} packs of pack.rows "
                f"{self.pack.rows}, which grad_accum {self.grad_accum} x {shards} data shards of "
                f"the mesh do not divide; use a multiple of "
                f"{self.grad_accum * shards * self.pack.rows} global_rows, or another grad_accum "
                "or mesh."
            )
        if shards % shares:
            raise ConfigError(
                f"The mesh's {shards} data shards do not divide over {shares} processes."
            )
