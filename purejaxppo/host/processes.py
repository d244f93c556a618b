"""Several processes, on one machine or many, that train one run together.

Process 0 listens at `coordinator`; the others connect to it and send their settings. If these
disagree, all processes exit with a message before JAX starts, since JAX's own service can only
abort. The connections stay open: if one breaks, a process has died, and the others exit at once
rather than wait in an exchange forever.
"""

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from purejaxppo.config import ConfigError

PEER_DIED = 1
"""Exit status of a process whose peer has died."""
_RETRY_SECONDS = 0.2
_HEARTBEAT_SECONDS = 20
_SHUTDOWN_SECONDS = 24 * 3600
"""How long processes wait for each other at the end, while the first one still evaluates."""
_DEATH_NOTICE_SECONDS = 5.0
"""How long to wait after a failed exchange for the broken connection to be noticed."""
_GOODBYE = b"."


@dataclass(frozen=True)
class Processes:
    """Address and number of the processes of a run, and the index of this one."""

    coordinator: str
    """HOST:PORT, where process 0 listens."""
    num_processes: int
    process_id: int
    wait_seconds: float = 60.0

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(
                f"coordinator = {self.coordinator!r}: must be HOST:PORT, as in 10.0.0.1:29400, the "
                "same in all processes"
            )
        if self.num_processes < 2:
            raise ConfigError(f"num_processes = {self.num_processes}: must be at least 2")
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"process_id = {self.process_id}: must be at least 0 and below num_processes = "
                f"{self.num_processes}"
            )

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


@contextmanager
def joined(processes: Processes | None, task: str) -> Iterator[None]:
    """Connect to the other processes for the duration of the block.

    Args:
        processes: None connects only under a launcher (Slurm, Open MPI).
        task: description of the work, which must be the same in all processes.

    Raises:
        ConfigError: if a process fails to connect in time, or they disagree.
    """
    if processes is None and not _under_launcher():
        yield
        return
    with ExitStack() as stack:
        peers: list[tuple[str, socket.socket]] = []
        if processes is None:
            jax.distributed.initialize()
        else:
            peers, coordinator = _connect_all(processes, task, stack)
            jax.distributed.initialize(
                coordinator,
                processes.num_processes,
                processes.process_id,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
        for name, peer in peers:
            threading.Thread(target=_watch, args=(name, peer), daemon=True).start()
        try:
            yield
        except (SystemExit, KeyboardInterrupt):  # all processes have agreed to stop
            _shut_down(peers)
            raise
        except jax.errors.JaxRuntimeError:
            # The exchange may have failed because a process died, which _watch reports shortly.
            time.sleep(_DEATH_NOTICE_SECONDS if peers else 0.0)
            raise
        _shut_down(peers)


def _under_launcher() -> bool:
    """Whether Slurm's srun or Open MPI has started this process as one of several."""
    counts = (
        os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    return any(count.isdecimal() and int(count) > 1 for count in counts)


def _shut_down(peers: list[tuple[str, socket.socket]]) -> None:
    """Tell the other processes that this one is finished, and wait until they are too."""
    for _, peer in peers:
        with suppress(OSError):
            peer.sendall(_GOODBYE)
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return jax.process_index() == 0


def agree(*numbers: int) -> np.ndarray:
    """Wait for all processes; return the numbers of each, `[processes, len(numbers)]`."""
    if jax.process_count() == 1:
        return np.asarray([numbers])
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(numbers, np.int32)))


def _connect_all(
    processes: Processes, task: str, stack: ExitStack
) -> tuple[list[tuple[str, socket.socket]], str]:
    """Connect to the other processes.

    Returns:
        name and connection of each, and the address for JAX's own service.
    """
    own = {
        "process_id": processes.process_id,
        "num_processes": processes.num_processes,
        "task": hashlib.sha256(task.encode()).hexdigest(),
    }
    if processes.process_id:
        first = stack.enter_context(_connect(processes))
        _send(first, own)
        answer = _receive(first, processes.wait_seconds)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return [("process 0", first)], answer["coordinator"]
    others = _accept(processes, stack)
    error = _disagreement(own, [settings for _, settings in others])
    answer = {"error": error} if error else {"coordinator": _free_address(processes.address[0])}
    for connection, _ in others:
        _send(connection, answer)
    if error:
        raise ConfigError(error)
    peers = [(f"process {settings['process_id']}", c) for c, settings in others]
    return peers, answer["coordinator"]


def _accept(processes: Processes, stack: ExitStack) -> list[tuple[socket.socket, dict[str, Any]]]:
    host, port = processes.address
    try:
        server = stack.enter_context(socket.create_server((host, port)))
    except OSError as error:
        raise ConfigError(
            f"coordinator = {processes.coordinator!r}: process 0 cannot listen there: "
            f"{error.strerror}; give an address of its machine and a free port"
        ) from error
    deadline = time.monotonic() + processes.wait_seconds
    found: list[tuple[socket.socket, dict[str, Any]]] = []
    while len(found) < processes.num_processes - 1:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection = stack.enter_context(server.accept()[0])
        except TimeoutError as error:
            raise ConfigError(
                f"num_processes = {processes.num_processes}: only {len(found) + 1} connected "
                f"within {processes.wait_seconds:g} s; start the others, or check that they can "
                f"reach {processes.coordinator}"
            ) from error
        found.append((connection, _receive(connection, processes.wait_seconds)))
    return found


def _connect(processes: Processes) -> socket.socket:
    deadline = time.monotonic() + processes.wait_seconds
    while True:
        try:
            return socket.create_connection(processes.address, timeout=5.0)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"coordinator = {processes.coordinator!r}: no answer from process 0 within "
                    f"{processes.wait_seconds:g} s ({error}); start it, or check the address"
                ) from error
            time.sleep(_RETRY_SECONDS)


def _disagreement(own: dict[str, Any], others: list[dict[str, Any]]) -> str | None:
    """Return what the settings of the processes disagree on, or None."""
    everyone = [own, *others]
    counts = sorted({int(x["num_processes"]) for x in everyone})
    if len(counts) > 1:
        return f"num_processes: the processes were given {counts}; give all of them the same value"
    ids = [int(x["process_id"]) for x in everyone]
    if len(set(ids)) < len(ids):
        return f"process_id: the processes were given {sorted(ids)}; give each a different one"
    if len({x["task"] for x in everyone}) > 1:
        return "the processes have different settings; start all with the same settings"
    return None


def _free_address(host: str) -> str:
    with socket.create_server((host, 0)) as server:
        return f"{host}:{server.getsockname()[1]}"


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any]:
    connection.settimeout(seconds)
    try:
        line = connection.makefile("rb").readline()
        return json.loads(line)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"coordinator: the answer is not from a process of this run ({error}); check the port"
        ) from error


def _watch(name: str, connection: socket.socket) -> None:
    """Exit this process if the other one ends without a goodbye."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    received = b""
    with suppress(OSError):
        received = connection.recv(1)
    if received != _GOODBYE:
        message = f"\npurejaxppo: lost {name}, so this process exits; resume with all processes\n"
        os.write(2, message.encode())
        sys.stdout.flush()
        os._exit(PEER_DIED)
