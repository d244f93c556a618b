"""The protocol between `benchmarks/speed.py` and a contestant; needs only the standard library.

A contestant gets a JSON specification as its argument and prints one JSON line when it is ready to
be timed. It then answers every line that it reads, `go` or another request, with one JSON line.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

SHARED = {
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
}
"""Hyperparameters with the same name in all peers; they are our defaults."""

_BEGAN = time.perf_counter()

Outcome = tuple[int, float | None]
"""Environment steps summed over seeds, and the mean return of late training episodes or None."""
Make = Callable[[dict[str, Any]], tuple[float | None, dict[str, Callable[[], Any]]]]
"""`spec -> (compile_seconds, requests)`; the request `go` trains once, returning an `Outcome`."""


def serve(make: Make, packages: list[str], device: Callable[[], str] = lambda: "cpu") -> None:
    """Answer requests until standard input ends.

    Args:
        packages: packages whose versions are reported.
    """
    answer = _take_stdout()
    import_seconds = time.perf_counter() - _BEGAN
    compile_seconds, requests = make(json.loads(sys.argv[1]))
    answer(
        {
            "compile_seconds": compile_seconds,
            "import_seconds": import_seconds,
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
            "device": device(),
        }
    )
    for line in sys.stdin:
        word = line.strip()
        answer(_timed(requests["go"]) if word == "go" else {"value": requests[word]()})


def _timed(train: Callable[[], Outcome]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    steps, mean_return = train()
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "steps": steps,
        "return": mean_return,
        "peak_rss_mb": peak_rss_mb(),
    }


def peak_rss_mb() -> float:
    """Peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _take_stdout() -> Callable[[dict[str, Any]], None]:
    """A writer of JSON lines to standard output; redirects all other output to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return answer
