"""The type checker that the tests run with: beartype, which jaxtyping asks about shapes.

jaxtyping's import hook checks calls of functions. `check_named_tuples` does the same for fields of
NamedTuples such as Batch: arrays must have the annotated shapes, with one size for each letter in
one tuple.
"""

import sys
import typing
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable

# As in PEP 484, an int is a float.
_CONF = BeartypeConf(is_pep484_tower=True)
check = beartype(conf=_CONF)


def _is_shape(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _any_library(hint: Any) -> Any:
    """The hint's shapes alone, of JAX or NumPy arrays (`jax.device_get` turns one into the other);
    None if it has no shape."""
    if _is_shape(hint):
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str]
    shapes = [_any_library(a) for a in typing.get_args(hint) if _is_shape(a)]
    return typing.Union[tuple(shapes)] if shapes else None  # noqa: UP007


@jaxtyping.jaxtyped(typechecker=None)
def _check(made: tuple, hints: dict[str, Any]) -> None:
    for name, hint in hints.items():
        value = getattr(made, name)
        # Trees of specs and of shapes have the same classes; only arrays are looked at.
        if isinstance(value, np.ndarray | jax.Array) and not is_bearable(value, hint, conf=_CONF):
            shape = f"{value.dtype}{list(value.shape)}"
            raise jaxtyping.TypeCheckError(
                f"{type(made).__name__}.{name} is {shape}, which is not {hint}; the others: "
                f"{ {n: np.shape(getattr(made, n)) for n in hints if n != name} }"
            )


def check_named_tuples(package: str) -> int:
    """Checks from now on every NamedTuple of a package's loaded modules; returns their number."""
    found = {
        value
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == package
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields")
        if value.__module__.split(".")[0] == package
    }
    count = 0
    for kind in found:
        shapes = {n: _any_library(h) for n, h in kind.__annotations__.items()}
        hints = {n: h for n, h in shapes.items() if h is not None}
        if hints and not hasattr(kind, "_unchecked"):
            kind._unchecked = kind.__new__
            kind.__new__ = _checked(kind.__new__, hints)
            count += 1
    return count


def _checked(new: Any, hints: dict[str, Any]) -> Any:
    def __new__(kind: type, *args: Any, **kwargs: Any) -> Any:
        made = new(kind, *args, **kwargs)
        _check(made, hints)
        return made

    return __new__
