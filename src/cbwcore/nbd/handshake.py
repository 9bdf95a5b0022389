"""The NBD handshake, fixed newstyle (NBD doc/proto.md): from the greeting to the last byte before transmission.

No byte is read beyond the one that a rule asks for: what a client sends behind its GO belongs to the transmission
phase, and what it sends behind STARTTLS in the clear meets the TLS handshake, which refuses it.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import CbwError
from cbwcore.nbd import protocol as nbd
from cbwcore.nbd.exports import Export, Exports
from cbwcore.nbd.limits import NbdLimits
from cbwcore.nbd.tls import TlsConfig, end_session

__all__ = ["HandshakeError", "Negotiated", "negotiate"]

PIECE = 65536  # bytes of a payload that nobody wants, at a time
SHOWN = 80  # characters of a client's name in a text


class HandshakeError(CbwError):
    """The client must be dropped; one line says why."""


class Negotiated(NamedTuple):
    """What the transmission phase is to be.

    ``sock`` is the TLS session after STARTTLS, with a descriptor of its own, which the caller closes as well as the
    socket that it gave; else it is that socket. ``contexts``: in the order of their ids on the wire, 1, 2, ...; None is
    base:allocation."""

    sock: socket.socket
    export: Export
    structured: bool
    contexts: tuple[DirtyBitmap | None, ...]


def negotiate(
    sock: socket.socket, exports: Exports, limits: NbdLimits, tls: TlsConfig | None, deadline: float
) -> Negotiated | None:
    """The handshake with the client on a connected stream socket, done before ``deadline`` (time.monotonic()).

    None: the client left. HandshakeError: it is to be dropped, and why. TimeoutError: the deadline. Other OSErrors are
    the socket's. ``sock`` stays the caller's, blocking again after success, and another thread may shut it down at any
    time, with TLS too. The export may have been removed when this returns."""
    handshake = _Handshake(sock, exports, limits, tls, deadline)
    negotiated = None
    try:
        negotiated = handshake.run()
    except _LeftError:
        pass
    except ssl.SSLError as e:
        raise HandshakeError(f"TLS failed: {getattr(e, 'verify_message', '') or e.reason or e}") from e
    finally:
        if negotiated is None:
            handshake.abandon()
    return negotiated


class _LeftError(Exception):
    """The client is gone, or said that it goes."""


class _Refused(Exception):  # noqa: N818
    """An option gets an error reply."""

    def __init__(self, kind: int, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text


class _Fields:
    """The payload of an option, taken apart from front to end; what does not fit is refused."""

    def __init__(self, payload: bytes | bytearray, string_bytes: int) -> None:
        self._payload = payload
        self._at = 0
        self._string_bytes = string_bytes

    def number(self, layout: struct.Struct) -> int:
        """An unsigned integer of that layout."""
        return int(layout.unpack(self._take(layout.size))[0])

    def string(self) -> str:
        """A string behind its length in 32 bits."""
        return checked_text(self._take(self.number(nbd.U32)), self._string_bytes)

    def end(self) -> None:
        """Nothing must be left."""
        if self._at != len(self._payload):
            raise _Refused(nbd.NBD_REP_ERR_INVALID, "the option is longer than what is in it")

    def _take(self, size: int) -> bytes:
        part = bytes(self._payload[self._at : self._at + size])
        if len(part) != size:
            raise _Refused(nbd.NBD_REP_ERR_INVALID, "the option is shorter than what should be in it")
        self._at += size
        return part


def checked_text(data: bytes, most: int) -> str:
    """A client's string: of ``most`` bytes, UTF-8, no NUL."""
    if len(data) > most:
        raise _Refused(nbd.NBD_REP_ERR_TOO_BIG, f"a string of {len(data)} bytes is over the limit of {most}")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise _Refused(nbd.NBD_REP_ERR_INVALID, "a string is no UTF-8") from None
    if "\0" in text:
        raise _Refused(nbd.NBD_REP_ERR_INVALID, "a string has a NUL in it")
    return text


def shown(name: str) -> str:
    """A client's name as it is fit for a line of text."""
    return repr(name if len(name) <= SHOWN else name[:SHOWN] + "...")


class _Handshake:
    """One handshake; a method an option. What an option answers goes out at once when it is done."""

    def __init__(
        self, sock: socket.socket, exports: Exports, limits: NbdLimits, tls: TlsConfig | None, deadline: float
    ) -> None:
        self._sock = sock
        self._session: ssl.SSLSocket | None = None  # once there is one, _sock is it
        self._exports = exports
        self._limits = limits
        self._tls = tls
        self._deadline = deadline
        self._no_zeroes = False
        self._option = 0  # the one being served
        self._out = bytearray()
        self._forget()

    def _forget(self) -> None:
        """Nothing is negotiated: at the start, and after STARTTLS, before which anybody may have negotiated."""
        self._structured = False
        self._context_export: Export | None = None
        self._contexts: tuple[DirtyBitmap | None, ...] = ()

    def run(self) -> Negotiated:
        """From the greeting to GO or EXPORT_NAME."""
        self._greet()
        for _ in range(self._limits.options):
            export = self._serve_option()
            self._flush()
            if export is not None:
                return self._negotiated(export)
        self._read(nbd.OPTION.size)  # or it leaves, as it may
        raise HandshakeError(f"more than {self._limits.options} options")

    def abandon(self) -> None:
        """The client is not served: end the TLS session, if there is one."""
        if self._session is not None:
            end_session(self._session)

    def _negotiated(self, export: Export) -> Negotiated:
        self._sock.settimeout(None)
        contexts = self._contexts if export is self._context_export else ()
        return Negotiated(self._sock, export, self._structured, contexts)

    def _greet(self) -> None:
        known = nbd.NBD_FLAG_FIXED_NEWSTYLE | nbd.NBD_FLAG_NO_ZEROES
        self._out += nbd.GREETING.pack(nbd.NBD_MAGIC, nbd.NBD_OPTS_MAGIC, known)
        self._flush()
        flags = nbd.CLIENT_FLAGS.unpack(self._read(nbd.CLIENT_FLAGS.size))[0]
        if flags & ~known:
            raise HandshakeError(f"unknown client flags {flags:#x}")
        self._no_zeroes = bool(flags & nbd.NBD_FLAG_C_NO_ZEROES)

    # ---- the options ----

    def _serve_option(self) -> Export | None:
        """One option, to the last byte of its payload; the export, once that is settled."""
        magic, self._option, length = nbd.OPTION.unpack(self._read(nbd.OPTION.size))
        if magic != nbd.NBD_OPTS_MAGIC:
            raise HandshakeError(f"bad magic {magic:#x} of an option")
        if length > self._limits.drain:
            raise HandshakeError(f"option {self._option} of {length} bytes, above {self._limits.drain}")
        if self._option == nbd.NBD_OPT_SET_META_CONTEXT:
            self._context_export = None  # the old set is gone, whatever comes of this one
        try:
            payload = self._admit(length)
            return OPTIONS[self._option](self, payload)
        except _Refused as e:
            if self._option == nbd.NBD_OPT_EXPORT_NAME:  # which has no error replies
                raise HandshakeError(e.text) from None
            self._reply(e.kind, e.text.encode()[: nbd.NBD_SHOULD_STRING].decode(errors="ignore").encode())
        return None

    def _admit(self, length: int) -> bytes:
        """The payload, if the option is known, allowed now, and no longer than it may be; else it is read and lost."""
        if self._option == nbd.NBD_OPT_ABORT:
            self._skip(length)  # and ignored
            return b""
        try:
            self._check_option(length)
        except _Refused:
            self._skip(length)
            raise
        return self._read(length)

    def _check_option(self, length: int) -> None:
        in_clear = self._tls is not None and self._tls.required and self._session is None
        if in_clear and self._option != nbd.NBD_OPT_STARTTLS:
            raise _Refused(nbd.NBD_REP_ERR_TLS_REQD, "this server requires TLS")
        if self._option not in OPTIONS:
            raise _Refused(nbd.NBD_REP_ERR_UNSUP, f"option {self._option} is not supported")
        if length > self._limits.option_bytes:
            text = f"option of {length} bytes is over the limit of {self._limits.option_bytes}"
            raise _Refused(nbd.NBD_REP_ERR_TOO_BIG, text)
        if length and self._option in WITHOUT_PAYLOAD:
            raise _Refused(nbd.NBD_REP_ERR_INVALID, f"option {self._option} has no payload")

    def _export_name(self, payload: bytes) -> Export:
        export = self._find(checked_text(payload, self._limits.string_bytes))
        self._out += nbd.EXPORT_NAME_REPLY.pack(export.size, export.transmission_flags(self._structured))
        if not self._no_zeroes:
            self._out += nbd.EXPORT_NAME_ZEROES
        return export

    def _abort(self, payload: bytes) -> None:
        self._reply(nbd.NBD_REP_ACK)
        try:
            self._flush()
        except TimeoutError:
            raise
        except OSError:  # it need not wait for the answer
            pass
        raise _LeftError

    def _list(self, payload: bytes) -> None:
        for export in self._exports:
            name = export.name.encode()
            self._reply(nbd.NBD_REP_SERVER, nbd.U32.pack(len(name)) + name + export.description.encode())
        self._reply(nbd.NBD_REP_ACK)

    def _starttls(self, payload: bytes) -> None:
        if self._tls is None:
            raise _Refused(nbd.NBD_REP_ERR_POLICY, "this server has no TLS")
        if self._session is not None:
            raise _Refused(nbd.NBD_REP_ERR_INVALID, "TLS is on already")
        self._reply(nbd.NBD_REP_ACK)
        self._flush()
        self._sock = self._session = self._tls.accept(self._sock, self._remaining())
        self._forget()

    def _info(self, payload: bytes) -> None:
        self._go(payload)

    def _go(self, payload: bytes) -> Export:
        fields = _Fields(payload, self._limits.string_bytes)
        name = fields.string()
        asked = {fields.number(nbd.U16) for _ in range(fields.number(nbd.U16))}
        fields.end()
        export = self._find(name)
        flags = export.transmission_flags(self._structured)
        self._reply(nbd.NBD_REP_INFO, nbd.INFO_EXPORT.pack(nbd.NBD_INFO_EXPORT, export.size, flags))
        sizes = export.block_sizes(self._limits.request)
        self._reply(nbd.NBD_REP_INFO, nbd.INFO_BLOCK_SIZE.pack(nbd.NBD_INFO_BLOCK_SIZE, *sizes))
        if nbd.NBD_INFO_NAME in asked:
            self._reply(nbd.NBD_REP_INFO, nbd.INFO_TYPE.pack(nbd.NBD_INFO_NAME) + export.name.encode())
        if nbd.NBD_INFO_DESCRIPTION in asked and export.description:
            text = export.description.encode()
            self._reply(nbd.NBD_REP_INFO, nbd.INFO_TYPE.pack(nbd.NBD_INFO_DESCRIPTION) + text)
        self._reply(nbd.NBD_REP_ACK)
        return export

    def _structured_reply(self, payload: bytes) -> None:
        self._structured = True
        self._reply(nbd.NBD_REP_ACK)

    def _list_meta_context(self, payload: bytes) -> None:
        export, queries = self._queries(payload)
        for name in export.contexts:
            if not queries or any(
                name == query or (query in WILDCARDS and name.startswith(query)) for query in queries
            ):
                self._reply(nbd.NBD_REP_META_CONTEXT, nbd.U32.pack(0) + name.encode())
        self._reply(nbd.NBD_REP_ACK)

    def _set_meta_context(self, payload: bytes) -> None:
        export, queries = self._queries(payload)
        contexts = export.contexts
        selected = [name for name in dict.fromkeys(queries) if name in contexts]  # others, wildcards too, select none
        for wire_id, name in enumerate(selected, 1):
            self._reply(nbd.NBD_REP_META_CONTEXT, nbd.U32.pack(wire_id) + name.encode())
        self._reply(nbd.NBD_REP_ACK)
        self._context_export = export
        self._contexts = tuple(contexts[name] for name in selected)

    def _queries(self, payload: bytes) -> tuple[Export, list[str]]:
        """The export and the queries of a meta context option."""
        if not self._structured:
            raise _Refused(nbd.NBD_REP_ERR_INVALID, "metadata contexts need structured replies first")
        fields = _Fields(payload, self._limits.string_bytes)
        name = fields.string()
        count = fields.number(nbd.U32)
        if count > self._limits.queries:
            raise _Refused(nbd.NBD_REP_ERR_TOO_BIG, f"{count} queries are over the limit of {self._limits.queries}")
        queries = [fields.string() for _ in range(count)]
        fields.end()
        return self._find(name), queries

    def _find(self, name: str) -> Export:
        export = self._exports.find(name)
        if export is None:
            raise _Refused(nbd.NBD_REP_ERR_UNKNOWN, f"there is no export {shown(name)}")
        return export

    # ---- bytes in and out, until the deadline ----

    def _remaining(self) -> float:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the handshake took too long")
        return seconds

    def _read_into(self, view: memoryview) -> None:
        while view:
            self._sock.settimeout(self._remaining())
            count = self._sock.recv_into(view)
            if count == 0:
                raise _LeftError
            view = view[count:]

    def _read(self, length: int) -> bytes:
        data = bytearray(length)
        self._read_into(memoryview(data))
        return bytes(data)

    def _skip(self, length: int) -> None:
        piece = memoryview(bytearray(min(length, PIECE)))
        while length:
            count = min(length, PIECE)
            self._read_into(piece[:count])
            length -= count

    def _reply(self, kind: int, data: bytes = b"") -> None:
        self._out += nbd.OPTION_REPLY.pack(nbd.NBD_REP_MAGIC, self._option, kind, len(data)) + data

    def _flush(self) -> None:
        view = memoryview(bytes(self._out))
        self._out.clear()
        while view:
            self._sock.settimeout(self._remaining())
            view = view[self._sock.send(view) :]


OPTIONS: dict[int, Callable[[_Handshake, bytes], Export | None]] = {
    nbd.NBD_OPT_EXPORT_NAME: _Handshake._export_name,
    nbd.NBD_OPT_ABORT: _Handshake._abort,
    nbd.NBD_OPT_LIST: _Handshake._list,
    nbd.NBD_OPT_STARTTLS: _Handshake._starttls,
    nbd.NBD_OPT_INFO: _Handshake._info,
    nbd.NBD_OPT_GO: _Handshake._go,
    nbd.NBD_OPT_STRUCTURED_REPLY: _Handshake._structured_reply,
    nbd.NBD_OPT_LIST_META_CONTEXT: _Handshake._list_meta_context,
    nbd.NBD_OPT_SET_META_CONTEXT: _Handshake._set_meta_context,
}
WITHOUT_PAYLOAD = (nbd.NBD_OPT_LIST, nbd.NBD_OPT_STARTTLS, nbd.NBD_OPT_STRUCTURED_REPLY)
WILDCARDS = ("base:", "qemu:", nbd.QEMU_DIRTY_BITMAP)  # of LIST_META_CONTEXT
