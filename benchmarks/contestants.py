"""Run the contestants of the speed benchmark, each in its own environment and process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks/peers"
ENVIRONMENTS = ROOT / ".bench"
SCRIPTS = {
    "ours": "ours.py",
    "ours, conv": "ours.py",
    "rejax": "rejax_peer.py",
    "sbx": "sbx_peer.py",
    "sb3": "sb3_peer.py",
}
OWN_ENVIRONMENT = {"rejax": "rejax", "sbx": "torch", "sb3": "torch"}
INSTALLED_FIRST = {"torch": "torch=="}
"""Package to install first, so that the other requirements do not install another build of it."""


def python_of(name: str) -> Path:
    """The interpreter of a contestant; creates its environment if missing or out of date."""
    if name not in OWN_ENVIRONMENT:
        return Path(sys.executable)
    folder = ENVIRONMENTS / OWN_ENVIRONMENT[name]
    python, stamp = folder / "bin/python", folder / "requirements.txt"
    wanted = PEERS / f"requirements-{folder.name}.txt"
    if stamp.exists() and stamp.read_text() == wanted.read_text():
        return python
    print(f"creating {folder.relative_to(ROOT)} ...", flush=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    if first := INSTALLED_FIRST.get(folder.name):
        pins = [x for x in wanted.read_text().splitlines() if x.startswith(first)]
        subprocess.run([*install, *pins], check=True)
    subprocess.run([*install, "--requirement", wanted], check=True)
    stamp.write_text(wanted.read_text())
    return python


def environment(cache: Path, accelerator: bool) -> dict[str, str]:
    """Environment variables of a contestant's process; its compilation cache is below `cache`."""
    variables = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    return variables if accelerator else variables | {"JAX_PLATFORMS": "cpu"}


class Contestant:
    """A process that answers requests (see `peers/worker.py`) until the context ends."""

    def __init__(
        self, name: str, spec: dict[str, Any], cache: Path, accelerator: bool = False
    ) -> None:
        self.name = name
        variables = environment(cache, accelerator)
        self._errors = cache / "standard-error.txt"
        cache.mkdir(parents=True, exist_ok=True)
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [python_of(name), PEERS / SCRIPTS[name], json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=variables,
                text=True,
            )
        self.ready = self._read()
        """`compile_seconds`, `import_seconds`, `versions` and `device`."""

    def ask(self, request: str) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        raise SystemExit(failure(self.name, status, self._errors.read_text(encoding="utf-8")))


def failure(name: str, status: int, errors: str) -> str:
    tail = "\n".join(errors.splitlines()[-20:])
    return f"{name} failed with exit status {status}; the end of its standard error:\n{tail}"


def output_of(name: str, script: str, spec: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Run a script in the environment of contestant `name`; parse its last output line as JSON.

    Raises:
        SystemExit: if the script fails, with the end of its standard error.
    """
    command = [python_of(name), PEERS / script, json.dumps(spec)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(cache, False), check=False
    )
    if done.returncode:
        raise SystemExit(failure(script, done.returncode, done.stderr))
    return json.loads(done.stdout.splitlines()[-1])
