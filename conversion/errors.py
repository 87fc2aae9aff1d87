"""The error of this package."""

from collections.abc import Iterable

from ov2_jax.core.errors import UserError


class ConversionError(UserError):
    """A checkpoint that cannot be converted; the message states the problem and the remedy."""


def listing(title: str, items: Iterable[str], limit: int = 40) -> str:
    """`title` and one indented line per item; items past `limit` are only counted."""
    items = list(items)
    lines = [f"{title} ({len(items)}):"] + [f"  {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join(lines)
