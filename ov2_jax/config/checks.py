"""The form of the error of a config field: its name, its value, the remedy."""

from ov2_jax.core.errors import ConfigError


def check_field(owner: str, name: str, value: object, good: bool, remedy: str) -> None:
    """Raises ConfigError unless `good`."""
    if not good:
        raise ConfigError(f"{owner}.{name} is {value!r}; it must be {remedy}.")


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
