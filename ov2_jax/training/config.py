"""The experiment: ml_collections at the edge, checked frozen dataclasses inside."""

import dataclasses
import importlib.util
import types
import typing
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict, config_dict

from ov2_jax.data.config import DataConfig, PackConfig
from ov2_jax.model.compute import ComputeConfig
from ov2_jax.model.config import ConfigError, ModelConfig
from ov2_jax.sharding import MeshConfig, check_mesh, data_shards
from ov2_jax.training.loss import REDUCTIONS
from ov2_jax.training.optimizer import OptimizerConfig
from ov2_jax.training.profile import check_profile_steps


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep: the last `keep_last`, and every `keep_every`-th step."""

    every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"checkpoint.{name} is {getattr(self, name)}; it must be >= 1.")
        if self.keep_every is not None and self.keep_every % self.every:
            raise ConfigError(
                f"checkpoint.keep_every {self.keep_every} must be a multiple of checkpoint.every "
                f"{self.every}, or nothing would ever be saved at those steps."
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run. `configs/*.py` make these; see there for what each is set to and why."""

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
                f"workdir is {self.workdir!r}; metrics are appended to, so it must be a "
                "folder of a file system: mount the bucket (gcsfuse, mountpoint-s3)."
            )
        if not self.data.sources:
            raise ConfigError("data.sources is (); name at least one data set (docs/data.md).")
        if self.init_from is None and self.tokenizer is None:
            raise ConfigError("Set init_from (a checkpoint) or tokenizer (a folder), or both.")
        for name in ("steps", "global_rows", "grad_accum", "max_skipped_in_a_row"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        check_profile_steps(self.profile_steps, self.steps)
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
        if self.tokenizer is not None and not epath.Path(self.tokenizer).exists():
            raise ConfigError(f"tokenizer is {self.tokenizer!r}, which does not exist.")

    @property
    def packs_per_step(self) -> int:
        return self.global_rows // self.pack.rows

    def check_mesh(self, sizes: Mapping[str, int], shares: int) -> None:
        """The mesh must divide the model and the pack, and micro-steps, data shards and the shares
        that processes read the global batch."""
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


def _build(kind: Any, value: Any, where: str) -> Any:
    """A config value as the dataclass, tuple or scalar that the field's type says."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a set of fields, but is {value!r}.")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ConfigError(
                f"{where or 'config'} has no field {', '.join(unknown)}; "
                f"it has {', '.join(sorted(hints))}."
            )
        required = {f.name for f in dataclasses.fields(kind) if _is_required(f)}
        missing = sorted(required - set(value))
        if missing:
            raise ConfigError(f"{where or 'config'} lacks {', '.join(missing)}.")
        prefix = f"{where}." if where else ""
        return kind(**{k: _build(hints[k], v, prefix + k) for k, v in value.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _build(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(inner) != len(value):
            raise ConfigError(f"{where} must have {len(inner)} entries, but is {value!r}.")
        items = zip(inner, value, strict=True)
        return tuple(_build(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(items))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, str, bool) and type(value) is not kind:
        raise ConfigError(f"{where} must be of type {kind.__name__}, but is {value!r}.")
    if origin is tuple:
        raise ConfigError(f"{where} must be a sequence, but is {value!r}.")
    return value


def experiment_config(values: Mapping[str, Any]) -> ConfigDict:
    """What a file of configs/ returns: its values, and the default of every other field.

    All fields are there, so each can be overridden on the command line; None is a placeholder of
    the field's type. Raises ConfigError on a field that does not exist.
    """
    return _with_defaults(Experiment, values, "")


def _with_defaults(kind: Any, values: Mapping[str, Any], where: str) -> ConfigDict:
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{where or 'config'} has no field {', '.join(unknown)}.")
    config = ConfigDict()
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        given = values.get(field.name, field.default)
        if given is dataclasses.MISSING:
            continue  # required and not given: experiment_from says so
        if dataclasses.is_dataclass(hint):
            given = dataclasses.asdict(given) if dataclasses.is_dataclass(given) else given
            config[field.name] = _with_defaults(hint, given, f"{where}{field.name}.")
        elif given is None:
            one = next(a for a in typing.get_args(hint) if a is not type(None))
            config[field.name] = config_dict.placeholder(one)
        else:
            config[field.name] = given
    return config


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def experiment_from(config: ConfigDict, *, needs_workdir: bool = True) -> Experiment:
    """Checks an ml_collections config and builds the experiment; raises ConfigError.

    Programs that start no run need no `workdir`.
    """
    try:
        values = config.to_dict()
    except OSError as e:  # a --config file that could not be loaded says so when it is first used
        reason = str(e.__cause__ or e).splitlines()[-1].strip()
        raise ConfigError(f"The file that --config names cannot be loaded: {reason}.") from e
    if not needs_workdir:
        values["workdir"] = values.get("workdir") or "unused"
    return _build(Experiment, values, "")


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """As plain data, to be kept with every checkpoint."""
    return dataclasses.asdict(experiment)


def data_config_from(values: Mapping[str, Any]) -> DataConfig:
    """The `data` part of what `experiment_to_dict` gave."""
    return _build(DataConfig, values, "data")
