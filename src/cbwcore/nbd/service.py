"""The connections of an NBD server: who is let in, the thread of each, and how all of them end.

One thread accepts, and tells of the snapshots that NBD writes broke. Each connection has a thread, which negotiates and
then stays in the core, without the GIL. `Service.lock` guards what changes; nothing is waited for under it, and it is
taken before the lock of `Exports`.

A connection's life: negotiating (it has no core) → served (it has one) → done. It gets its core under the lock, unless
the server is closing or its export is gone by then: whoever stops the connections of an export, or all of them, misses
none.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import socket
import ssl
import sys
import termios
import threading
import time
from collections.abc import Collection, Iterable

from cbwcore._cbwcore import NbdConnectionCore, NbdCore
from cbwcore.disk import Disk
from cbwcore.errors import CbwError
from cbwcore.forked import forked
from cbwcore.nbd.exports import Export, Exports
from cbwcore.nbd.handshake import Negotiated, negotiate
from cbwcore.nbd.limits import NbdLimits
from cbwcore.nbd.listen import SocketFile, peer_name, peer_uid
from cbwcore.nbd.tls import TlsConfig, relay

__all__ = ["Service"]

logger = logging.getLogger(__name__)

ACCEPT_PAUSE = 1.0  # seconds without accepting after a failure that would only come again
STOPPED = "stopped"
LEFT_IN_PEACE = ("disconnected by the client", "gone", STOPPED)  # ends that are nobody's fault
SENT_POLL_MS = 5
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # a peer that vanished is noticed in 2 minutes


def disk_of(export: Export) -> Disk:
    """The disk that an export is of, or whose snapshot it is of."""
    return export.source if isinstance(export.source, Disk) else export.source.disk


def tell_breaks(exports: Iterable[Export]) -> None:
    """Tell of the snapshots that broke, of all disks of the exports; what a callback raises is logged."""
    for disk in {id(disk): disk for disk in map(disk_of, exports)}.values():
        try:
            disk._report_breaks()
        except BaseException:  # a callback's SystemExit, too, is not to end the thread that all connections need
            logger.exception("%s: telling of a broken snapshot failed", disk.path)


class Connection:
    """One client."""

    def __init__(self, service: Service, sock: socket.socket) -> None:
        self.peer = peer_name(sock)
        self.export: Export | None = None  # once it is served
        self.core: NbdConnectionCore | None = None  # likewise
        self.sockets = [sock]  # all that are to be closed; the first is the client's own, also under TLS
        self._service = service
        self._done = threading.Event()
        self._thread: threading.Thread | None = None  # None where a caller of serve_connection() runs it
        self._runs_in = 0  # the thread that does

    def start(self) -> None:
        """Run in a thread. RuntimeError where there can be none."""
        thread = threading.Thread(target=self.run, name=f"nbd {self.peer}", daemon=True)
        thread.start()
        self._thread = thread

    def run(self) -> None:
        """Negotiate and serve, to the end."""
        self._runs_in = threading.get_ident()
        try:
            self._run()
        except (CbwError, OSError, ValueError, RuntimeError) as e:  # a closed disk, no thread for TLS
            self._dropped(e)
        except Exception:
            logger.exception("%s: dropped", self.peer)
        finally:
            self.end()

    def end(self) -> None:
        """Close it, and forget it."""
        self._service.forget(self)
        self._done.set()

    def interrupt(self) -> None:
        """End it: served, it finishes what is in flight; negotiating, at once. Under the service's lock."""
        if self.core is not None:
            self.core.stop()
            return
        with contextlib.suppress(OSError):
            self.sockets[0].shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        """Until it is over and its thread is no more. Does nothing in that thread, where a signal's handler may run."""
        if self._runs_in == threading.get_ident():
            return
        self._done.wait()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        service = self._service
        deadline = time.monotonic() + service.limits.handshake_seconds
        negotiated = negotiate(self.sockets[0], service.exports, service.limits, service.tls, deadline)
        if negotiated is None:
            logger.info("%s: ended in the handshake", self.peer)
            return
        if negotiated.sock is not self.sockets[0]:
            self.sockets.append(negotiated.sock)
        export = negotiated.export
        if not service.enter(self, export, make_core(service.core, negotiated)):
            logger.info("%s: export %r is no longer there", self.peer, export.name)
            return
        logger.info("%s: export %r: connected", self.peer, export.name)
        how = self._transmit(negotiated.sock)
        level = logging.INFO if how in LEFT_IN_PEACE else logging.WARNING
        logger.log(level, "%s: export %r: %s", self.peer, export.name, how)

    def _transmit(self, sock: socket.socket) -> str:
        """The transmission phase; how it ended."""
        assert self.core is not None
        if not isinstance(sock, ssl.SSLSocket):
            how = self.core.serve(sock.fileno())
            if how == STOPPED:
                wait_until_sent(sock, self._service.limits.stall_seconds)
            return how
        ours, theirs = socket.socketpair()
        self.sockets += ours, theirs
        stall_seconds = self._service.limits.stall_seconds
        relaying = threading.Thread(
            target=relay, args=(sock, theirs, stall_seconds), name=f"nbd tls {self.peer}", daemon=True
        )
        relaying.start()
        try:
            return self.core.serve(ours.fileno())
        finally:
            ours.close()  # the relay sends what is left, and ends
            relaying.join()

    def _dropped(self, error: Exception) -> None:
        """Log it: with a warning, if it was not the closing of the server that ended it."""
        level = logging.DEBUG if self._service.closing else logging.WARNING
        where = "in the handshake" if self.export is None else f"from export {self.export.name!r}"
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        logger.log(level, "%s: dropped %s: %s", self.peer, where, text)


def make_core(core: NbdCore, negotiated: Negotiated) -> NbdConnectionCore:
    """The compiled part of a connection. ValueError where the disk or snapshot was closed meanwhile."""
    export = negotiated.export
    return NbdConnectionCore(
        core,
        export.source,
        read_only=not export.writable,
        discard=export.discard,
        structured=negotiated.structured,
        contexts=negotiated.contexts,
    )


class Service:
    """All connections of a server. It has threads, which keep it alive; `NbdServer` is what users hold, and close."""

    def __init__(
        self,
        exports: Exports,
        listeners: list[socket.socket],
        files: list[SocketFile],
        *,
        tls: TlsConfig | None,
        allow_uids: Collection[int] | None,
        limits: NbdLimits,
    ) -> None:
        """Take over the ``listeners`` and the socket ``files``, unless this raises."""
        self.exports = exports
        self.tls = tls
        self.limits = limits
        self.lock = threading.RLock()  # again by the same thread: where the garbage collector closes a server
        self.core = NbdCore(
            bytes_in_flight=limits.bytes_in_flight,
            connections=limits.connections,
            max_request=limits.request,
            max_drain=limits.drain,
            max_extents=limits.extents,
            stall_seconds=limits.stall_seconds,
        )
        self.closing = False  # set once
        self.forked = False  # in the child of a fork, for good
        self._allow_uids = allow_uids
        self._listeners = listeners
        self._files = files
        self._changed = threading.Condition(self.lock)  # a connection is over
        self._connections: dict[Connection, None] = {}
        self._idle_since = time.monotonic()
        self._accepting = False
        self._resume = 0.0  # when to accept again, time.monotonic()
        self._unattended = False  # nobody waits for the end: the accepting thread does what is left to do
        self._finished = False
        self._wake, self._waker = socket.socketpair()
        for sock in (*listeners, self._wake, self._waker):
            sock.setblocking(False)
        forked.add(self)
        self._thread = threading.Thread(target=self._run, name="nbd accept", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._let_go(self._wake, self._waker)
            raise

    # ---- for the server ----

    def start_accepting(self) -> None:
        """Let clients in; until then they wait in the backlog."""
        if not self._accepting:
            with self.lock:
                self._idle_since = time.monotonic()  # opening a disk may have taken long, and no client could come
        self._accepting = True
        self._wake_up()

    def add(self, sock: socket.socket) -> Connection | None:
        """A connection that the caller starts or runs; None where the peer is refused, and ``sock`` closed."""
        with contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            connection = Connection(self, sock)
            with self.lock:
                refusal = self._refusal(sock)
                if refusal is None:
                    self._connections[connection] = None
            if refusal is not None:
                logger.warning("%s: refused: %s", connection.peer, refusal)
                return None
            undo.pop_all()
        return connection

    def remove_export(self, name: str) -> None:
        """Forget an export, and see its connections end. ConfigError."""
        export = self.exports.remove(name)
        with self.lock:
            leaving = [c for c in self._connections if c.export is export]
            for connection in leaving:
                connection.interrupt()
        for connection in leaving:
            connection.wait()
        tell_breaks([export])

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._connections)

    @property
    def idle_seconds(self) -> float:
        """Since the last one ended; 0 while there is one."""
        with self.lock:
            return 0.0 if self._connections else time.monotonic() - self._idle_since

    def close(self) -> None:
        """End it all and wait; from any thread, any number of times."""
        with self.lock:
            self._begin_close()
            leaving = tuple(self._connections)
        self._wake_up()
        for connection in leaving:
            connection.wait()
        if self._thread is not threading.current_thread():
            self._thread.join()
        tell_breaks(self.exports)
        with self.lock:
            if not self._finished:
                self._finished = True
                self.core._stop_helpers()
                del self.core  # with its descriptors: nobody needs it any more
                self._let_go(self._wake, self._waker)

    def close_unattended(self) -> None:
        """Begin the end, and wait for nothing."""
        with self.lock:
            self._unattended = True
            self._begin_close()
        self._wake_up()

    def _abandon(self) -> None:
        """In the child of a fork: it has no threads to serve with, and must not keep the clients' connections open."""
        self.forked = True
        self._let_go(*self._listeners, self._wake, self._waker)
        for connection in tuple(self._connections):
            self._let_go(*connection.sockets)

    # ---- for the connections ----

    def enter(self, connection: Connection, export: Export, core: NbdConnectionCore) -> bool:
        """From negotiating to served; False where that is too late."""
        with self.lock:
            if self.closing or not any(export is each for each in self.exports):
                return False
            connection.export, connection.core = export, core
        self._wake_up()  # there may be room for another one to negotiate
        return True

    def forget(self, connection: Connection) -> None:
        """A connection is over: close its sockets."""
        with self.lock:  # under which interrupt() uses them, so that it never meets another file of that number
            del self._connections[connection]
            self._let_go(*connection.sockets)
            self._idle_since = time.monotonic()
        self._wake_up()

    # ---- the accepting thread ----

    def _run(self) -> None:
        while not self.closing:
            try:
                self._turn()
            except Exception:
                logger.exception("accepting connections failed")
                self._resume = time.monotonic() + ACCEPT_PAUSE
        if self._unattended:
            self.close()

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        listeners = {sock.fileno(): sock for sock in self._listeners} if self._has_room() else {}
        pause = self._resume - time.monotonic()
        if pause > 0:
            listeners = {}
        ready = wait_readable([self._wake.fileno(), self.core.fileno(), *listeners], pause if pause > 0 else None)
        if self._wake.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(4096)
        if self.core.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self.core.fileno(), 8)
            tell_breaks(self.exports)
        for fd in listeners.keys() & ready:
            if self._has_room():
                self._accept(listeners[fd])

    def _has_room(self) -> bool:
        """Whether another client may begin to negotiate; else it waits in the backlog, for no longer than handshakes
        take."""
        with self.lock:
            return self._accepting and sum(c.core is None for c in self._connections) < self.limits.negotiating

    def _accept(self, listener: socket.socket) -> None:
        with self.lock:  # close() does not close the descriptor, so that another file gets its number, in between
            if self.closing:
                return
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return  # the client did not wait
            except OSError as e:
                logger.warning("accepting a connection failed: %s", e.strerror)
                self._resume = time.monotonic() + ACCEPT_PAUSE
                return
        try:
            prepare(sock)
            connection = self.add(sock)
        except OSError as e:
            logger.info("a connection ended before it began: %s", e.strerror)
            sock.close()
            return
        if connection is not None:
            self._start(connection)

    def _start(self, connection: Connection) -> None:
        try:
            connection.start()
        except RuntimeError as e:
            connection.end()
            logger.warning("%s: refused: %s", connection.peer, e)
            self._resume = time.monotonic() + ACCEPT_PAUSE

    def _refusal(self, sock: socket.socket) -> str | None:
        """Why a peer is not let in. Under the lock."""
        if self.closing:
            return "the server is closing"
        if self._allow_uids is not None:
            uid = peer_uid(sock)
            if uid is None:
                return "only some users may connect, and whose a TCP connection is cannot be told"
            if uid not in self._allow_uids:
                return f"user {uid} may not connect"
        if len(self._connections) >= self.limits.connections:
            return f"there are {self.limits.connections} connections, the limit"
        return None

    # ---- the end ----

    def _begin_close(self) -> None:
        """Under the lock."""
        if not self.closing:
            self.closing = True
            for file in self._files:
                file.remove()  # while its socket is open: see SocketFile.is_there()
            self._let_go(*self._listeners)
        for connection in tuple(self._connections):
            connection.interrupt()

    def _wake_up(self) -> None:
        """Let the accepting thread look around."""
        with self.lock, contextlib.suppress(BlockingIOError):  # it has been told often enough
            if not self._finished:
                self._waker.send(b"\0")

    @staticmethod
    def _let_go(*sockets: socket.socket) -> None:
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.close()


def wait_readable(fds: Iterable[int], timeout: float | None) -> set[int]:
    """The descriptors that have something to read or to say, after at most ``timeout`` seconds."""
    poller = select.poll()
    for fd in fds:
        if fd >= 0:  # -1: closed meanwhile
            poller.register(fd, select.POLLIN)
    return {fd for fd, _ in poller.poll(None if timeout is None else timeout * 1000)}


def wait_until_sent(sock: socket.socket, seconds: float) -> None:
    """Until the peer's kernel has all that was sent, or is gone, or ``seconds`` are over.

    Linux throws away what a TCP socket has not sent yet when that is closed with something unread; a client that is
    stopped may well have sent more requests, and is to have the answers to those before them."""
    if sock.family == socket.AF_UNIX:
        return  # what was sent is in the peer's queue at once
    gone = select.poll()
    gone.register(sock, 0)
    end = time.monotonic() + seconds
    while time.monotonic() < end and int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder):
        if gone.poll(SENT_POLL_MS):
            return


def prepare(sock: socket.socket) -> None:
    """A fresh connection's options. OSError where it has ended."""
    sock.setblocking(True)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
