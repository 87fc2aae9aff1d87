"""The progress bar of programs that count what they do: done, rate and time left, on stderr."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "-/s")


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, *, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Yields the function that advances the bar by a number of units, of `total` in all."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    console = console or Console(stderr=True)
    with Progress(*columns, console=console, speed_estimate_period=300) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
