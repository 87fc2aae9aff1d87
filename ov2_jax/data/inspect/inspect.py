"""What the model sees, as one HTML page.

    python -m ov2_jax.data.inspect --config=configs/quickstart.py --out=report.html

The page shows packed rows, the exact text with its loss, every picture as the patches hold it,
codec-style clips frame by frame, how full the rows are, and which samples were rejected and why.
It needs no network. No accelerator is used, and only the page is written.
"""

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ov2_jax.config.experiment import Experiment
from ov2_jax.core.errors import UserError
from ov2_jax.core.files import to_path, write_file
from ov2_jax.data.encoding.tokenizer import Tokenizer
from ov2_jax.data.inspect.packs import show_packs
from ov2_jax.data.inspect.page import Collector, render


class InspectError(UserError):
    """The page cannot be written to the path that was given."""


def inspect_data(
    experiment: Experiment,
    tokenizer: Tokenizer,
    *,
    count: int = 1000,
    samples: int = 24,
    title: str = "",
    command: str = "",
) -> str:
    """The page of the first packs that a run of one process trains on.

    `count` samples are packed and counted; `samples` of them are shown with their pictures. Raises
    ConfigError and DataError if the data cannot be read at all.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("samples", total=count)
        packs = show_packs(
            experiment.data,
            experiment.pack,
            experiment.model,
            tokenizer,
            seed=experiment.seed,
            count=count,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
        collector = Collector(experiment.pack, experiment.model, packs.names, samples)
        for pack in packs:
            collector.add(pack)
        progress.update(bar, description="pictures")
        return render(
            collector,
            collector.details(tokenizer),
            packs.rejected,
            title=title,
            command=command,
            checked=packs.checked,
            origin=packs.origin,
            epoch=packs.epoch,
            seed=experiment.seed,
            pack=experiment.pack,
            model=experiment.model,
        )


def check_out(out: epath.PathLike) -> epath.Path:
    """Raises InspectError before an hour is spent on a page that cannot be written."""
    path = to_path(out)
    if path.suffix not in (".html", ".htm"):
        raise InspectError(f"--out is {str(out)!r}; name an .html file.")
    if path.is_dir():
        raise InspectError(f"--out is {str(out)!r}, which is a folder; name an .html file.")
    if not path.parent.is_dir():
        raise InspectError(f"--out is {str(out)!r}, but there is no folder {str(path.parent)!r}.")
    return path


def write_page(page: str, path: epath.PathLike) -> None:
    # Ids and file names may hold lone surrogates, which UTF-8 has no bytes for.
    write_file(path, page.encode("utf-8", "backslashreplace"))
