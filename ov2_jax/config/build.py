"""Builds the experiment: ml_collections in configs/ and on the command line, dataclasses inside.

We build the dataclasses ourselves because no library keeps our errors: dacite and cattrs take True
for 1, msgspec ignores unknown fields, and pydantic's errors would need a translation of this size.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from ov2_jax.config.data import DataConfig
from ov2_jax.config.experiment import Experiment
from ov2_jax.core.errors import ConfigError


def _build(kind: Any, value: Any, where: str) -> Any:
    """Plain data as a dataclass, tuple or scalar: `kind` is the type of the field `where`."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; it must be a set of fields.")
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
            raise ConfigError(f"{where} is {value!r}; it must have {len(inner)} entries.")
        items = zip(inner, value, strict=True)
        return tuple(_build(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(items))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, str, bool) and type(value) is not kind:
        raise ConfigError(f"{where} is {value!r}; it must be of type {kind.__name__}.")
    if origin is tuple:
        raise ConfigError(f"{where} is {value!r}; it must be a sequence.")
    return value


def experiment_config(values: Mapping[str, Any]) -> ConfigDict:
    """What a file of configs/ returns: its values, and the default of every other field.

    It has all fields, so that each can be overridden on the command line. None becomes a
    placeholder of the field's type. Raises ConfigError if a field does not exist.
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
            continue  # required and not given: experiment_from raises
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
    values = config.to_dict()
    if not needs_workdir:
        values["workdir"] = values.get("workdir") or "unused"
    return _build(Experiment, values, "")


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain data, which is saved with every checkpoint."""
    return dataclasses.asdict(experiment)


def data_config_from(values: Mapping[str, Any]) -> DataConfig:
    """The data section from its part of `experiment_to_dict`'s plain data."""
    return _build(DataConfig, values, "data")
