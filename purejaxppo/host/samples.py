"""`samples.jsonl`: what a policy does at points of a run, as text."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purejaxppo.config import ConfigError
from purejaxppo.host.rundir import (
    SAMPLES,
    StorageError,
    append,
    resume_command,
    sync,
    write_whole,
)


class SampleLog:
    """Appends to `samples.jsonl`: a line per sample.

    Args:
        after: the update from which training continues; later rows are dropped.

    Raises:
        ConfigError: if the file was changed.
        StorageError: if rows cannot be dropped.
    """

    def __init__(self, run_dir: Path, after: int):
        self._run_dir, self._path, self._last = run_dir, run_dir / SAMPLES, -1
        if not self._path.exists():
            return
        rows = [row for row in read_samples(run_dir) if row["update"] <= after]
        self._last = max((row["update"] for row in rows), default=-1)
        try:
            write_whole(self._path, _text(rows))
        except OSError as error:
            raise self._error(error) from error

    def add(self, update: int, samples: Sequence[dict[str, Any]]) -> None:
        """Append the samples after `update` updates; does nothing if there are some already.

        Raises:
            StorageError: if they cannot be written; the file is left unchanged.
        """
        if update <= self._last:
            return
        try:
            with self._path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    append(file, _text([{"update": update} | row for row in samples]).encode())
                    os.fsync(file.fileno())
                    if size == 0:
                        sync(self._path.parent)
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise self._error(error) from error
        self._last = update

    def _error(self, error: OSError) -> StorageError:
        return StorageError(
            f"{str(self._path)!r}: cannot be written: {error.strerror}; free space, then: "
            f"{resume_command(self._run_dir)}"
        )


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The complete rows, without a last one that a kill cut short.

    Raises:
        ConfigError: if the file was changed.
    """
    path = run_dir / SAMPLES
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    try:
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["update"] = int(row["update"])
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(
            f"{str(path)!r}: was changed: {error}; restore a copy, or delete the file, which loses "
            "the samples so far"
        ) from error
    return rows


def _text(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
