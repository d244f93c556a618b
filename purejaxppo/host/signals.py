"""SIGTERM and SIGINT: the first asks a run to stop at a good moment, the second ends it at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the process has been asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def leave(self) -> NoReturn:
        """Raise what the signal would have: `KeyboardInterrupt`, or `SystemExit` with 143."""
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signum or 0))


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the first SIGTERM or SIGINT as a request; a second one is raised where it comes.

    In a thread other than the main one, where Python takes no signals, nothing is caught; a
    signal that the process ignores stays ignored.
    """
    stop = StopRequest()

    def take(signum: int, _: object) -> None:
        again, stop.signum = bool(stop), signum
        if again:
            stop.leave()

    with _handled(take):
        yield stop


@contextmanager
def exit_at_second_signal() -> Iterator[None]:
    """For a process that is nothing but a run: a second signal ends it even while compiled code
    keeps Python from taking signals, and one before or after the run ends it with 128 + number."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen, wake = os.pipe()
    os.set_blocking(wake, False)

    def watch() -> None:
        asked = False
        while byte := os.read(seen, 1):
            if byte[0] not in STOPPING:
                continue
            if asked:
                if sys.stdout.isatty():
                    os.write(1, b"\x1b[?25h\n")  # the cursor, which a live bar hides
                os._exit(128 + byte[0])
            asked = True
            name = signal.Signals(byte[0]).name
            again = "press Ctrl-C again to quit immediately"
            os.write(2, f"\npurejaxppo: {name}: stopping; {again}\n".encode())

    def take(signum: int, _: object) -> None:
        stop = StopRequest()
        stop.signum = signum
        stop.leave()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        with _handled(take):
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(wake)
        watcher.join()
        os.close(seen)


@contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    previous = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [s for s in STOPPING if signal.getsignal(s) != signal.SIG_IGN]
        previous = {s: signal.signal(s, handler) for s in wanted}
    try:
        yield
    finally:
        for signum, old in previous.items():
            signal.signal(signum, signal.SIG_DFL if old is None else old)
