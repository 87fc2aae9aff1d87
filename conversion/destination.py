"""A folder that appears whole or not at all."""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from conversion.errors import ConversionError
from ov2_jax.core.files import is_remote


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `path`, which becomes `path` when the block ends.

    If the block raises, the temporary folder is deleted.

    Raises:
      ConversionError: `path` is remote, or has something in it already.
    """
    if is_remote(path):
        raise ConversionError(
            f"{path} is remote. Conversion writes to a local disk; copy the folder afterwards "
            "(for example with `gcloud storage cp -r`)."
        )
    target = pathlib.Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{path} already exists; choose another place or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield made
        made.chmod(0o755)  # mkdtemp's folders are for their owner only
        made.rename(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
