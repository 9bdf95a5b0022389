"""TLS of an NBD server: certificates, the server's side of STARTTLS, and the relay to the compiled loop.

The compiled loop serves a plain socket. With TLS that is one end of a socket pair, and `relay` carries the bytes
between its other end and the client's TLS session::

    client ══ TLS ══ tls_sock ── relay ── plain_sock ──┤socket pair├── the loop
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import cast

from cbwcore.errors import ConfigError

__all__ = ["TlsConfig", "relay"]

logger = logging.getLogger(__name__)

CA_CERT = "ca-cert.pem"
CA_CRL = "ca-crl.pem"
SERVER_CERT = "server-cert.pem"
SERVER_KEY = "server-key.pem"
BUFFER = 65536  # bytes in each direction
RECORD = 16384  # the most bytes of a TLS record


class TlsConfig:
    """Certificates of a server, in a directory under the names that libnbd and QEMU use, and whether TLS is a must.

    ``ca-cert.pem`` (who may sign clients' certificates), ``server-cert.pem``, ``server-key.pem``, and ``ca-crl.pem``
    if it is there: then every authority in a client's chain must have a list in it that is not out of date. Clients
    must show a certificate. TLS 1.2 at least. With ``required`` False a client that does not ask for TLS is served in
    the clear. All is read at once: later changes of the files have no effect. ConfigError names the missing file, or
    says what is wrong with one.
    """

    def __init__(self, directory: str | os.PathLike[str], required: bool = True) -> None:
        self.directory = os.fsdecode(directory)
        self.required = required
        for name in (CA_CERT, SERVER_CERT, SERVER_KEY):
            if not os.path.isfile(self._path(name)):
                raise ConfigError(f"TLS needs {self._path(name)}, which is no file")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
        self.context.num_tickets = 0  # nobody resumes a session; a client that reads late would not see its alert
        self._load(SERVER_CERT, self._load_own)
        self._load(CA_CERT, self.context.load_verify_locations)
        if self._has(CA_CRL):
            self._load(CA_CRL, self._load_revoked)

    def _has(self, name: str) -> bool:
        """Whether it is there at all. OSError: what cannot be looked at must not pass for missing."""
        try:
            os.lstat(self._path(name))
        except FileNotFoundError:
            return False
        return True

    def __repr__(self) -> str:
        return f"<TlsConfig {self.directory}, {'required' if self.required else 'allowed'}>"

    def accept(self, sock: socket.socket, timeout: float) -> ssl.SSLSocket:
        """The server's side of a TLS handshake on a connected socket, in ``timeout`` seconds.

        The session has a descriptor of its own, and ``sock`` stays as it is, for whoever may want to shut it down.
        ssl.SSLError; OSError, TimeoutError."""
        own = sock.dup()
        with contextlib.ExitStack() as undo:
            undo.callback(own.close)
            session = self.context.wrap_socket(own, server_side=True, do_handshake_on_connect=False)
            undo.callback(session.close)
            session.settimeout(timeout)
            session.do_handshake()
            undo.pop_all()
        return session

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _load(self, name: str, load: Callable[[str], object]) -> None:
        try:
            load(self._path(name))
        except ssl.SSLError as e:
            raise ConfigError(f"{self._path(name)}: {e.reason or e}") from e
        except OSError as e:
            raise ConfigError(f"{self._path(name)}: {e.strerror}") from e

    def _load_own(self, path: str) -> None:
        self.context.load_cert_chain(path, self._path(SERVER_KEY), password=self._no_password)

    def _no_password(self) -> str:
        """Called for an encrypted key; without it OpenSSL would ask on the terminal."""
        raise ConfigError(f"{self._path(SERVER_KEY)} is encrypted; a server's key must not be")

    def _load_revoked(self, path: str) -> None:
        trusted = self.context.cert_store_stats()["x509"]
        self.context.load_verify_locations(path)
        found = self.context.cert_store_stats()
        if not found["crl"] or found["x509"] != trusted:  # a certificate in it would be trusted
            raise ConfigError(f"{path} is no list of revoked certificates alone")
        self.context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN


def end_session(session: ssl.SSLSocket) -> None:
    """Tell the client that the session is over, if it is there to hear, and close. Never waits."""
    with contextlib.suppress(OSError):
        session.setblocking(False)
        _close_notify(session, 0)
    session.close()


def _close_notify(session: ssl.SSLSocket, seconds: float) -> None:
    """Send the end of a non-blocking session, within ``seconds``; the client's own is not waited for."""
    while True:
        try:
            session.unwrap()
        except ssl.SSLWantWriteError:
            if _poll({session.fileno(): select.POLLOUT}, seconds):
                continue
        except (OSError, ValueError):
            pass
        return


def _poll(masks: dict[int, int], seconds: float | None) -> dict[int, int]:
    """The descriptors that have events, or trouble, after up to ``seconds``."""
    poller = select.poll()
    for fd, mask in masks.items():
        poller.register(fd, mask)
    return dict(poller.poll(None if seconds is None else max(0.0, seconds) * 1000))


def relay(tls_sock: ssl.SSLSocket, plain_sock: socket.socket, stall_seconds: float = 30.0) -> None:
    """Carry bytes between a client's TLS session and the server's loop, which has the other end of ``plain_sock``.

    Returns when the loop has closed its end and the client has all that it sent; or when the client is gone, or takes
    nothing for ``stall_seconds`` of what is there for it. Where the client ends first, the loop gets all that it sent,
    and then the end; what the loop still answers goes out. At the end both sockets are shut down; they stay the
    caller's to close. Another thread may shut either down to end it. Raises nothing for what clients do.
    """
    tls_sock.setblocking(False)
    plain_sock.setblocking(False)
    inbound = _Flow(_Receiver(tls_sock), _Sender(plain_sock))
    outbound = _Flow(_Receiver(plain_sock), _Sender(tls_sock))
    told = False
    while not outbound.over:
        moved = inbound.move() | outbound.move()
        if inbound.over and not told:
            told = True
            with contextlib.suppress(OSError):
                plain_sock.shutdown(socket.SHUT_WR)
        if moved:
            continue
        left = outbound.seconds_left(stall_seconds)
        if left is not None and left <= 0:
            logger.info("a TLS client took nothing for %s s and is dropped", stall_seconds)
            break
        _wait([*inbound.wanted(), *outbound.wanted()], left)
    _close_notify(tls_sock, stall_seconds if outbound.over else 0)
    for sock in (tls_sock, plain_sock):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class _End:
    """Receiving from, or sending to, one of the relay's sockets, without waiting."""

    def __init__(self, sock: socket.socket, event: int, move: Callable[[memoryview], int]) -> None:
        self._event = event
        self._move = move
        self.fd = sock.fileno()
        self.waits_for = 0  # the event before which a call is no use; 0: it may be called

    def __call__(self, view: memoryview) -> int | None:
        """How many bytes were moved; None: it must wait, and ``waits_for`` says for what. OSError, ValueError."""
        try:
            return self._move(view)
        except ssl.SSLWantReadError:  # a TLS record may need the other direction, too
            self.waits_for = select.POLLIN
        except ssl.SSLWantWriteError:
            self.waits_for = select.POLLOUT
        except BlockingIOError:
            self.waits_for = self._event
        return None


class _Receiver(_End):
    def __init__(self, sock: socket.socket) -> None:
        self._pending: Callable[[], int] = sock.pending if isinstance(sock, ssl.SSLSocket) else lambda: 0
        super().__init__(sock, select.POLLIN, _reading(sock) if isinstance(sock, ssl.SSLSocket) else sock.recv_into)

    def __call__(self, view: memoryview) -> int | None:
        count = super().__call__(view)
        # A small piece is mostly the last one: to ask poll, which comes next anyway, saves a call in vain. But poll
        # does not know of what is decrypted already.
        if count is not None and count < RECORD and not self._pending():
            self.waits_for = select.POLLIN
        return count


class _Sender(_End):
    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, select.POLLOUT, sock.write if isinstance(sock, ssl.SSLSocket) else sock.send)


def _reading(session: ssl.SSLSocket) -> Callable[[memoryview], int]:
    """Its recv_into. That one, and its send, fall back to plain text when somebody has shut the session down, and these
    raise ValueError."""
    read = cast(Callable[[int, memoryview], int], session.read)
    return lambda view: read(len(view), view)


class _Flow:
    """One direction of a relay: a buffer, its first part sent, its last part free.

    What is unsent never moves and never shrinks but by being sent: TLS wants the same bytes again after it blocked.
    """

    def __init__(self, receiver: _Receiver, sender: _Sender) -> None:
        self._receiver = receiver
        self._sender = sender
        self._buffer = memoryview(bytearray(BUFFER))
        self._sent = 0
        self._filled = 0
        self._ended = False  # nothing more comes
        self._since = 0.0  # when there last was nothing to send, or some of it went out (time.monotonic())

    @property
    def over(self) -> bool:
        """Whether all has come and all is sent, or nobody is there to send it to."""
        return self._ended and self._sent == self._filled

    def wanted(self) -> list[_End]:
        """The ends that have something to do."""
        ends: list[_End] = []
        if self._has_room():
            ends.append(self._receiver)
        if self._sent < self._filled:
            ends.append(self._sender)
        return ends

    def _has_room(self) -> bool:
        return not self._ended and self._filled < BUFFER

    def seconds_left(self, stall_seconds: float) -> float | None:
        """How long what is unsent may still wait; None if there is nothing."""
        if self._sent == self._filled:
            return None
        return self._since + stall_seconds - time.monotonic()

    def move(self) -> bool:
        """Receive and send what can be without waiting; False if that is nothing, and every wanted end waits."""
        moved = False
        if self._has_room() and not self._receiver.waits_for:
            moved = self._receive()
        if self._sent < self._filled and not self._sender.waits_for:
            moved |= self._send()
        return moved

    def _receive(self) -> bool:
        try:
            count = self._receiver(self._buffer[self._filled :])
        except (OSError, ValueError) as e:  # reset, no TLS, or shut down: as if it had ended there
            logger.debug("receiving ends: %s", e)
            count = 0
        if count is None:
            return False
        if self._sent == self._filled:
            self._since = time.monotonic()
        self._filled += count
        self._ended = count == 0
        return True

    def _send(self) -> bool:
        try:
            count = self._sender(self._buffer[self._sent : self._filled])
        except (OSError, ValueError) as e:
            logger.debug("sending ends: %s", e)
            self._ended = True
            count = self._filled - self._sent
        if count is None:
            return False
        self._since = time.monotonic()
        self._sent += count
        if self._sent == self._filled:
            self._sent = self._filled = 0
        return True


def _wait(ends: list[_End], seconds: float | None) -> None:
    """Until one of the ends may go on; then all of its socket may try, for TLS has a say in both directions."""
    masks: dict[int, int] = {}
    for end in ends:
        masks[end.fd] = masks.get(end.fd, 0) | end.waits_for
    ready = _poll(masks, seconds)
    for end in ends:
        if end.fd in ready:
            end.waits_for = 0
