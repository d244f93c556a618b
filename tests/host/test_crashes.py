"""Faults at every call that changes a file: kills, torn writes, failing calls, power loss.

`faults/interpose.c` watches a short run and a short sweep. A kill leaves the directory in its
current state, so the directory is copied before and after each call, and each copy is resumed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import some, some_or_all

from faults import scenario  # isort: skip

FAULTS = Path(__file__).parents[1] / "faults"
pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="the interposer needs a C compiler, cc"
)


RESUMES = 6
"""Number of resumes to inject every fault into, each from a different state after a kill."""
FAILURES = (f"once:{ENOSPC}", f"once:{EIO}", f"lasting:{ENOSPC}")


class Call(NamedTuple):
    """One line of the log."""

    number: int
    name: str
    path: str
    other: str
    result: int


class Watched(NamedTuple):
    """One undisturbed run of a scenario."""

    what: str
    root: Path
    """The directory that the interposer watched."""
    snapshots: dict[str, Path]
    """Copies of it, named `NNNNN-before` and `NNNNN-after`."""
    calls: list[Call]
    outcome: dict[str, Any]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("interposer") / "interpose.so"
    source = FAULTS / "interpose.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", target, source, "-ldl"], check=True)
    return target


def environment(library: Path, root: Path, **more: Any) -> dict[str, str]:
    cache = {"JAX_COMPILATION_CACHE_DIR": Path(".pytest_cache/xla").absolute()}
    own = {"LD_PRELOAD": library, "FAULT_ROOT": root, **cache, **more}
    return os.environ | {name: str(value) for name, value in own.items()}


@pytest.fixture(scope="module", params=[pytest.param("run", marks=pytest.mark.faults), "sweep"])
def watched(
    request: pytest.FixtureRequest, library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    return watch(request.param, library, tmp_path_factory.mktemp("watched"))


def watch(what: str, library: Path, folder: Path, snapshot: Path | None = None) -> Watched:
    """Watch a scenario from its start, or the resume of a snapshot."""
    root, snapshots, log = folder / "root", folder / "snapshots", folder / "log"
    snapshots.mkdir()
    if snapshot is not None:
        shutil.copytree(snapshot, root)
    subprocess.run(
        [sys.executable, FAULTS / "scenario.py", what, root],
        env=environment(library, root, FAULT_SNAPSHOTS=snapshots, FAULT_LOG=log),
        check=True,
    )
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    calls = [Call(int(n), name, path, other, int(r)) for n, name, path, other, r in lines]
    copies = {path.name: path for path in sorted(snapshots.iterdir())}
    return Watched(what, root, copies, calls, scenario.outcome(what, root))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario.speed_up(monkeypatch.setattr)


def fingerprint(directory: Path) -> str:
    """Digest of names and contents."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(f"{path.relative_to(directory)}\0{path.is_dir()}\0".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def states_after_a_kill(watched: Watched) -> Iterator[tuple[str, Path]]:
    """Yield each state that differs from all earlier ones."""
    seen = set()
    for name, path in watched.snapshots.items():
        if (mark := fingerprint(path)) not in seen:
            seen.add(mark)
            yield name, path


def differences(watched: Watched, snapshot: Path, tmp_path: Path) -> list[str]:
    """Resume a snapshot; return the results that differ from the undisturbed ones."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(snapshot, copy)
    return scenario.resume_and_compare(watched.what, copy, watched.outcome)


def test_every_step_of_a_checkpoint_is_watched(watched: Watched):
    """Orbax writes from C++; those calls must be watched too."""
    saving = [c for c in watched.calls if ".saving" in c.path and c.result >= 0]
    renamed = [Path(c.other) for c in saving if c.name == "rename"]
    assert sum(to.parent.name == "checkpoints" and to.name.isdecimal() for to in renamed) >= 2
    written = {Path(c.path).name for c in saving if c.name == "write"}
    assert "manifest.json.part" in written
    assert any(Path(c.path).parent.name == "d" for c in saving if c.name == "write")
    synced = {c.path for c in saving if c.name == "fsync"}
    assert any(Path(path).name == "_METADATA" for path in synced)


@some_or_all
def test_a_kill_before_or_after_any_call(watched: Watched, tmp_path: Path, count: int | None):
    states = some(list(states_after_a_kill(watched)), count)
    found = {name: differences(watched, state, tmp_path) for name, state in states}
    print(len(found), "states")
    assert {name: what for name, what in found.items() if what} == {}


@some_or_all
def test_a_half_finished_write(watched: Watched, tmp_path: Path, count: int | None):
    found = {}
    for call in some([c for c in watched.calls if c.name == "write" and c.result > 1], count):
        torn = tmp_path / "torn"
        shutil.rmtree(torn, ignore_errors=True)
        shutil.copytree(watched.snapshots[f"{call.number:05d}-after"], torn)
        written = torn / Path(call.path).relative_to(watched.root)
        if not written.exists():
            continue
        size = written.stat().st_size
        os.truncate(written, max(0, size - call.result // 2))
        found[call.number] = differences(watched, torn, tmp_path)
    print(len(found), "torn writes")
    assert {name: what for name, what in found.items() if what} == {}


@some_or_all
def test_a_failing_call(watched: Watched, library: Path, tmp_path: Path, count: int | None):
    numbers = [call.number for call in watched.calls if call.result >= 0]
    calls = some([f"{number}:{kind}" for number in numbers for kind in FAILURES], count)
    found = dict(fail(watched, library, tmp_path, calls))
    print(len(found), "failing calls")
    assert {call: what for call, what in found.items() if what} == {}


@pytest.mark.slow
@some_or_all
def test_a_second_kill_during_the_resume(
    watched: Watched, library: Path, tmp_path: Path, count: int | None
):
    found = {}
    for name, first in some(list(states_after_a_kill(watched)), 1 if count else RESUMES):
        (tmp_path / name).mkdir()
        again = watch(watched.what, library, tmp_path / name, first)
        for second, state in some(list(states_after_a_kill(again)), count):
            found[f"{name} {second}"] = differences(watched, state, tmp_path)
    print(len(found), "second kills")
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.faults
def test_a_failing_call_during_the_resume(watched: Watched, library: Path, tmp_path: Path):
    found = {}
    for name, state in some(list(states_after_a_kill(watched)), 2):
        (tmp_path / name).mkdir()
        again = watch(watched.what, library, tmp_path / name, state)
        calls = [f"{c.number}:{kind}" for c in again.calls if c.result >= 0 for kind in FAILURES]
        found |= {f"{name} {k}": x for k, x in fail(watched, library, tmp_path, calls, state)}
    print(len(found), "failing calls")
    assert {name: what for name, what in found.items() if what} == {}


def fail(
    watched: Watched, library: Path, folder: Path, calls: list[str], snapshot: Path | None = None
) -> list[tuple[str, list[str]]]:
    """Make each call fail, then resume; return the results that differ for each."""
    root, given = folder / "root", [] if snapshot is None else ["--from", snapshot]
    done = subprocess.run(
        [sys.executable, FAULTS / "scenario.py", watched.what, root, *given, *calls],
        env=environment(library, root), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [(call, what) for call, what in map(json.loads, done.stdout.splitlines())]
    assert [call for call, _ in found] == calls
    return found


class Disk:
    """Models what a power loss leaves: the content of each file at its last sync, and the entries
    of each directory at its last sync, or all of its entries, since a journal may write a rename
    before the data of the file. Data that was never synced is lost."""

    def __init__(self, root: Path, all_entries: bool):
        self._root, self._all_entries, self._made = root, all_entries, 1
        self._now: dict[Path, int] = {root: 0}
        """Number of the file or directory that a path names."""
        self._folders = {0}
        self._names: dict[int, dict[str, int]] = {}
        self._contents: dict[int, bytes] = {}

    def take(self, call: Call, after: Path) -> None:
        """Apply a call, given a copy of the directory after it."""
        path = Path(call.path)
        if call.name in ("open", "mkdir") and path not in self._now:
            self._now[path], self._made = self._made, self._made + 1
            self._folders |= {self._now[path]} if call.name == "mkdir" else set()
        elif call.name in ("rename", "unlink"):
            self._move(path, Path(call.other) if call.name == "rename" else None)
        elif call.name == "fsync" and path in self._now:
            number, copy = self._now[path], after / path.relative_to(self._root)
            if number in self._folders:
                self._names[number] = self._children(path)
            else:
                self._contents[number] = copy.read_bytes()

    def _move(self, path: Path, to: Path | None) -> None:
        moved = {p: n for p, n in self._now.items() if p == path or path in p.parents}
        self._now = {
            p: n for p, n in self._now.items() if p not in moved and (to is None or p != to)
        }
        if to is not None:
            self._now |= {to / p.relative_to(path): n for p, n in moved.items()}

    def _children(self, path: Path) -> dict[str, int]:
        return {p.name: n for p, n in self._now.items() if p.parent == path and p != path}

    def write(self, target: Path, path: Path | None = None, number: int = 0) -> None:
        """Write the remaining files to `target`."""
        target.mkdir()
        path = path or self._root
        entries = self._children(path) if self._all_entries else self._names.get(number, {})
        for name, child in entries.items():
            if child in self._folders:
                self.write(target / name, path / name, child)
            else:
                (target / name).write_bytes(self._contents.get(child, b""))


@pytest.mark.parametrize("all_entries", [False, True], ids=["synced", "journaled"])
@some_or_all
def test_a_power_loss_at_any_call(
    watched: Watched, tmp_path: Path, all_entries: bool, count: int | None
):
    disk, cuts, seen = Disk(watched.root, all_entries), [], set()
    for call in watched.calls:
        if call.result < 0:
            continue
        disk.take(call, watched.snapshots[f"{call.number:05d}-after"])
        left = tmp_path / f"{call.number:05d}"
        disk.write(left)
        if (mark := fingerprint(left)) not in seen:
            seen.add(mark)
            cuts.append(left)
    found = {left.name: differences(watched, left, tmp_path) for left in some(cuts, count)}
    print(len(found), "power losses")
    assert {name: what for name, what in found.items() if what} == {}
