"""Several processes, on one machine or many, that share one training.

Process 0 listens at `coordinator`; the others connect to it and say who they are. What they do not
agree on ends them all with a message before JAX starts, whose own service can only abort. The
connections then stay open: where one breaks, a process has died, and the others end at once rather
than wait in an exchange for ever.
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

DIED = 1
"""Exit status of a process whose peer has died."""
_RETRY_SECONDS = 0.2
_HEARTBEAT_SECONDS = 20
_PATIENCE_SECONDS = 24 * 3600
"""How long processes wait for each other at the end, where the first still evaluates."""
_TELLING_SECONDS = 5.0
_GOODBYE = b"."


@dataclass(frozen=True)
class Processes:
    """Who takes part, and which of them this process is."""

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
    """With the other processes while the block lasts; alone if `processes` is None.

    Args:
        task: what this process is about to do, which must be the same in all.

    Raises:
        ConfigError: if they do not all come in time, or do not agree.
    """
    if processes is None and not _under_launcher():
        yield
        return
    with ExitStack() as stack:
        peers: list[tuple[str, socket.socket]] = []
        if processes is None:
            jax.distributed.initialize()
        else:
            peers, coordinator = _meet(processes, task, stack)
            jax.distributed.initialize(
                coordinator,
                processes.num_processes,
                processes.process_id,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_PATIENCE_SECONDS,
            )
        for name, peer in peers:
            threading.Thread(target=_watch, args=(name, peer), daemon=True).start()
        try:
            yield
        except (SystemExit, KeyboardInterrupt):  # to which all processes have agreed
            _part(peers)
            raise
        except jax.errors.JaxRuntimeError:
            # An exchange fails where a process has died, maybe before its connection has told.
            time.sleep(_TELLING_SECONDS if peers else 0.0)
            raise
        _part(peers)


def _under_launcher() -> bool:
    """Whether Slurm's srun, or Open MPI, has started this process as one of several."""
    counts = (
        os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    return any(count.isdecimal() and int(count) > 1 for count in counts)


def _part(peers: list[tuple[str, socket.socket]]) -> None:
    """Tell the others that this process has come to its end, and wait until they have."""
    for _, peer in peers:
        with suppress(OSError):
            peer.sendall(_GOODBYE)
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return jax.process_index() == 0


def agree(*numbers: int) -> np.ndarray:
    """`[processes, len(numbers)]` what each process has given; a wait for all of them."""
    if jax.process_count() == 1:
        return np.asarray([numbers])
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(numbers, np.int32)))


def _meet(
    processes: Processes, task: str, stack: ExitStack
) -> tuple[list[tuple[str, socket.socket]], str]:
    """Connections to the others, by their names, and where JAX's service is to be."""
    about = {
        "process_id": processes.process_id,
        "num_processes": processes.num_processes,
        "task": hashlib.sha256(task.encode()).hexdigest(),
    }
    if processes.process_id:
        first = stack.enter_context(_connect(processes))
        _send(first, about)
        answer = _receive(first, processes.wait_seconds)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return [("process 0", first)], answer["coordinator"]
    others = _accept(processes, stack)
    error = _disagreement(about, [said for _, said in others])
    answer = {"error": error} if error else {"coordinator": _free_address(processes.address[0])}
    for connection, _ in others:
        _send(connection, answer)
    if error:
        raise ConfigError(error)
    return [(f"process {said['process_id']}", c) for c, said in others], answer["coordinator"]


def _accept(processes: Processes, stack: ExitStack) -> list[tuple[socket.socket, dict[str, Any]]]:
    host, port = processes.address
    try:
        server = stack.enter_context(socket.create_server((host, port)))
    except OSError as error:
        raise ConfigError(
            f"coordinator = {processes.coordinator!r}: process 0 cannot listen there: "
            f"{error.strerror}; give an address of its machine and a free port"
        ) from error
    give_up = time.monotonic() + processes.wait_seconds
    found: list[tuple[socket.socket, dict[str, Any]]] = []
    while len(found) < processes.num_processes - 1:
        server.settimeout(max(0.01, give_up - time.monotonic()))
        try:
            connection = stack.enter_context(server.accept()[0])
        except TimeoutError as error:
            raise ConfigError(
                f"num_processes = {processes.num_processes}: only {len(found) + 1} came within "
                f"{processes.wait_seconds:g} s; start the others, or see why they cannot reach "
                f"{processes.coordinator}"
            ) from error
        found.append((connection, _receive(connection, processes.wait_seconds)))
    return found


def _connect(processes: Processes) -> socket.socket:
    give_up = time.monotonic() + processes.wait_seconds
    while True:
        try:
            return socket.create_connection(processes.address, timeout=5.0)
        except OSError as error:
            if time.monotonic() > give_up:
                raise ConfigError(
                    f"coordinator = {processes.coordinator!r}: process 0 does not answer there "
                    f"since {processes.wait_seconds:g} s ({error}); start it, or check the address"
                ) from error
            time.sleep(_RETRY_SECONDS)


def _disagreement(mine: dict[str, Any], others: list[dict[str, Any]]) -> str | None:
    everyone = [mine, *others]
    counts = sorted({int(said["num_processes"]) for said in everyone})
    if len(counts) > 1:
        return f"num_processes: the processes were told {counts}; tell all of them the same"
    ids = [int(said["process_id"]) for said in everyone]
    if len(set(ids)) < len(ids):
        return f"process_id: the processes have {sorted(ids)}; give each its own"
    if len({said["task"] for said in everyone}) > 1:
        return "the processes have different settings; start all with the same ones"
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
            f"coordinator: what answers there is no process of this run ({error}); check the port"
        ) from error


def _watch(name: str, connection: socket.socket) -> None:
    """End this process when the other one is gone without a word."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    said = b""
    with suppress(OSError):
        said = connection.recv(1)
    if said != _GOODBYE:
        end = f"\npurejaxppo: {name} is gone, so this one ends; resume the run with all of them\n"
        os.write(2, end.encode())
        sys.stdout.flush()
        os._exit(DIED)
