"""The experiment: ml_collections at the edge, checked frozen dataclasses inside."""

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
