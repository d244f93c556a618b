"""`samples.jsonl`: what a policy does at points of a run, as text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purejaxppo.config import ConfigError
from purejaxppo.host.rundir import SAMPLES, StorageError, resume_command, write_whole


class SampleLog:
    """Writes `samples.jsonl`, one line per sample. The file is replaced as a whole, so that the
    samples of an update are all there or none.

    Args:
        after: the update from which the run resumes; later rows are dropped.

    Raises:
        ConfigError: if the file was changed.
    """

    def __init__(self, run_dir: Path, after: int):
        self._run_dir, self._path = run_dir, run_dir / SAMPLES
        old = read_samples(run_dir) if self._path.exists() else []
        self._rows = [row for row in old if row["update"] <= after]

    def add(self, update: int, samples: Sequence[dict[str, Any]]) -> None:
        """Add the samples taken after `update` updates, unless they were already written.

        Raises:
            StorageError: if they cannot be written; the file is left unchanged.
        """
        if self._rows and update <= self._rows[-1]["update"]:
            return
        rows = [*self._rows, *({"update": update} | row for row in samples)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            write_whole(self._path, text)
        except OSError as error:
            raise StorageError(
                f"{str(self._path)!r}: cannot be written: {error.strerror}; free space, then: "
                f"{resume_command(self._run_dir)}"
            ) from error
        self._rows = rows


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """Read the rows.

    Raises:
        ConfigError: if the file was changed or cannot be read.
    """
    path = run_dir / SAMPLES
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["update"] = int(row["update"])
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{str(path)!r}: was changed: {error}; restore a copy, or delete the file, which loses "
            "the samples so far"
        ) from error
    return rows
