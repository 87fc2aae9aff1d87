"""The file of rejected samples, one JSON object a line: reason, detail, id, file, line."""

import json
from pathlib import Path

from ov2_jax.data.errors import DataError, Rejected


class RejectLog:
    """Appends to `rejected.jsonl`, every sample once however often it comes by.

    What the file already holds counts as written, so neither later epochs nor a resumed run repeat
    a line.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._known: set[tuple[str, int]] = set()
        if self._path.exists():
            data = self._path.read_bytes()
            # A run that was killed while writing leaves half a line, which is cut off.
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                with self._path.open("r+b") as file:
                    file.truncate(len(whole))
            for line in whole.splitlines():
                try:
                    entry = json.loads(line)
                    self._known.add((entry["file"], entry["line"]))
                except (ValueError, TypeError, KeyError) as error:
                    raise DataError(
                        f"{self._path} is not a list of rejected samples ({error}); move it away "
                        "or name another file."
                    ) from error

    @property
    def path(self) -> Path:
        return self._path

    def add(self, rejected: Rejected) -> bool:
        """Writes the sample unless it is known; returns whether it was new."""
        key = (rejected.file, rejected.line)
        if key in self._known:
            return False
        self._known.add(key)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(rejected._asdict(), ensure_ascii=False) + "\n"
        with self._path.open("ab") as file:
            file.write(line.encode("utf-8", "backslashreplace"))
        return True
