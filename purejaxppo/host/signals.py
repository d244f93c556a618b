"""SIGTERM and SIGINT: the first asks a run to save and stop, the second ends it at once."""

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
        """Raise the exception for the signal: `KeyboardInterrupt`, or `SystemExit(143)`."""
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signum or 0))


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a stop request; a second one is raised at once.

    Catches nothing outside the main thread, where Python handles no signals. Signals that the
    process ignores stay ignored.
    """
    stop = StopRequest()

    def take(signum: int, _: object) -> None:
        second, stop.signum = bool(stop), signum
        if second:
            stop.leave()

    with _handled(take):
        yield stop


@contextmanager
def exit_at_second_signal() -> Iterator[None]:
    """Exit at a second signal even while compiled code keeps Python from handling signals; a signal
    before or after the run exits with 128 + number. For processes that do nothing but a run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received, wake = os.pipe()
    os.set_blocking(wake, False)

    def watch() -> None:
        asked = False
        while byte := os.read(received, 1):
            if byte[0] not in STOPPING:
                continue
            if asked:
                if sys.stdout.isatty():
                    os.write(1, b"\x1b[?25h\n")  # show the cursor, which a live bar hides
                os._exit(128 + byte[0])
            asked = True
            name = signal.Signals(byte[0]).name
            hint = "press Ctrl-C again to quit immediately"
            os.write(2, f"\npurejaxppo: {name}: stopping; {hint}\n".encode())

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
        os.close(received)


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
