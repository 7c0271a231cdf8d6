"""A connection between the first host and each other one, which breaks when a host dies: then all end, in a line that says why.

JAX notices a dead host when its heartbeats stay away, after 100 s by default, and ends the process with a stack trace; a
collective may hang until then, or fail with an error of its library. The kernel of a host closes the connections of a process
that dies at once, and keep-alive probes find a host that is gone with its kernel. A host that cannot go on says why here.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time

import numpy as np
from jax.experimental import multihost_utils

from qwen35_jax import command
from qwen35_jax.errors import OtherHostError

SETTLE_SECONDS = 1.0  # in which the end of another host, if that is what failed here, comes to be known


@dataclasses.dataclass
class _Peer:
    """The other end of a connection. `name` is empty until it has shown to be a host; `done`: it ends as it should."""

    name: str
    done: bool = False
    received: bytes = b""


class Lifeline:
    """The connections of this process: of the first host to all others, of each other one to the first.

    All hosts make one together; `address` is where the others reach the first. A host that is silent for `timeout` seconds
    counts as dead. Use as a context manager around what the hosts do together: its errors end all of them.
    """

    def __init__(self, host: int, count: int, address: str, timeout: int):
        self._name = f"host {host} of {count} ({socket.gethostname()})"
        self._timeout = timeout
        self._peers: dict[socket.socket, _Peer] = {}
        self._quiet = False
        _flusher()
        self._selector = selectors.DefaultSelector()
        listener = _listen() if host == 0 else None
        port = listener.getsockname()[1] if listener else 0
        # A stranger who finds the port does not know the number, and is not listened to.
        told = multihost_utils.broadcast_one_to_all(np.array([port, secrets.randbits(31)], np.int32))
        port, self._secret = (int(n) for n in told)
        if listener:
            self._selector.register(listener, selectors.EVENT_READ)
        else:
            self._connect(address, port)
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None or isinstance(error, SystemExit):  # of a run that was told to stop, on all hosts
            self._tell({"done": True})
            return
        told = isinstance(error, OtherHostError)
        time.sleep(SETTLE_SECONDS * (5 if told else 1))
        self._quiet = True
        if not told:
            reason = str(error) if isinstance(error, command.EXPECTED) else f"{kind.__name__} {str(error)[:200]}".strip()
            self._tell({"stop": f"{self._name} cannot go on: {reason}"})
        end_without_waiting()

    def _connect(self, address: str, port: int) -> None:
        try:
            connection = socket.create_connection((address, port), timeout=self._timeout)
        except OSError as error:
            text = f"{self._name} cannot reach the first one at {address}:{port} ({error.strerror or error})"
            print(f"note: {text}: a host that dies is noticed after {self._timeout} s", file=sys.stderr, flush=True)
            return
        self._add(connection, f"the first host ({address})")
        self._tell({"secret": self._secret, "name": self._name})

    def _add(self, connection: socket.socket, name: str = "") -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Three quarters of the time, so that the line comes before JAX's stack trace; what a system does not know stays as it is.
        times = {"TCP_KEEPIDLE": self._timeout // 4, "TCP_KEEPINTVL": self._timeout // 8, "TCP_KEEPCNT": 4}
        for option, value in (times | {"TCP_USER_TIMEOUT": 750 * self._timeout}).items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), max(1, value))
        self._peers[connection] = _Peer(name)
        self._selector.register(connection, selectors.EVENT_READ)

    def _tell(self, message: dict) -> None:
        """To all peers that can be told."""
        for connection in list(self._peers):
            try:
                connection.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                pass  # it is gone: the watch says so

    def _watch(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj in self._peers:
                    self._hear(key.fileobj, self._peers[key.fileobj])
                else:
                    with contextlib.suppress(OSError):  # a caller that has gone again
                        self._add(key.fileobj.accept()[0])

    def _hear(self, connection: socket.socket, peer: _Peer) -> None:
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        *lines, peer.received = (peer.received + data).split(b"\n")
        known = all(self._obey(peer, line) for line in lines)
        if data and known and len(peer.received) < 10_000:
            return
        self._selector.unregister(connection)
        del self._peers[connection]
        connection.close()
        if peer.name and not peer.done:
            why = "see what it printed, or whether its machine was taken away"
            self._end(f"{peer.name} has gone without a word: {why}; the same command on all hosts resumes from a checkpoint")

    def _obey(self, peer: _Peer, line: bytes) -> bool:
        """False if this is no host of ours."""
        try:
            message = json.loads(line)
            if not peer.name and message["secret"] != self._secret:
                return False
        except (ValueError, TypeError, KeyError, RecursionError):
            return False
        peer.name = message.get("name", peer.name)
        peer.done = message.get("done", peer.done)
        if "stop" in message:
            self._end(message["stop"])
        return True

    def _end(self, reason: str) -> None:
        if self._quiet:
            return
        self._tell({"stop": reason})
        command.complain(reason)
        _end_now()


def _listen() -> socket.socket:
    """On any free port, of both families where the machine has both."""
    with contextlib.suppress(OSError, ValueError):
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def end_without_waiting() -> None:
    """Has this process, once it ends, not wait for the others at JAX's barrier: they will not come to it. Status 1."""
    _flusher()
    atexit.register(_end_now)


def _end_now() -> None:
    wanted, flushing = _flusher()
    wanted.set()
    flushing.join(SETTLE_SECONDS)
    os._exit(1)


@functools.cache
def _flusher() -> tuple[threading.Event, threading.Thread]:
    """The thread that writes out what is printed once the event is set; the end waits for it, but not for ever.

    Where a reader does not take what is printed, another thread waits for it and holds the stream. It is started before it is
    wanted, since Python 3.12 starts no thread while it ends.
    """
    wanted = threading.Event()
    flushing = threading.Thread(target=_flush, args=(wanted,), daemon=True)
    flushing.start()
    return wanted, flushing


def _flush(wanted: threading.Event) -> None:
    wanted.wait()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader is gone
            stream.flush()
