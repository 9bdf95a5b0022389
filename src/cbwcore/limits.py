"""Limits of the engine; `cbwcore.limits` is the one instance."""

from __future__ import annotations

from cbwcore._cbwcore import copy_buffers, polling_threads, set_copy_budget, set_polling_threads
from cbwcore.errors import ConfigError

__all__ = ["Limits", "limits"]

MIN_COPY_BYTES = 4096
MAX_COPY_BYTES = 1 << 20
MAX_COPIES = 1024
MIN_COPY_BUFFERS = 1 << 20
MAX_POLLING_THREADS = 4096


def _checked(what: str, value: int, least: int, most: int) -> int:
    if not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{what} {value!r} is no number in {least}..{most}")
    return value


class Limits:
    """What copying may take. A changed limit holds for copies, or snapshots, to come."""

    def __init__(self) -> None:
        self._copies = 64
        self._copy_bytes = MAX_COPY_BYTES

    @property
    def copy_buffers(self) -> int:
        """Bytes that all copy buffers of the process may take (R17); default 128 MiB.

        Besides, each disk and each snapshot has up to 8 MiB for requests that do not fit O_DIRECT."""
        return copy_buffers()[0]

    @copy_buffers.setter
    def copy_buffers(self, value: int) -> None:
        set_copy_budget(_checked("copy_buffers", value, MIN_COPY_BUFFERS, 2**62))

    @property
    def copies(self) -> int:
        """Copies of one snapshot at once; default 64. For snapshots taken from then on."""
        return self._copies

    @copies.setter
    def copies(self, value: int) -> None:
        self._copies = _checked("copies", value, 1, MAX_COPIES)

    @property
    def copy_bytes(self) -> int:
        """Bytes of one copy, where the cluster is not larger: a power of two, default 1 MiB. For snapshots to come."""
        return self._copy_bytes

    @copy_bytes.setter
    def copy_bytes(self, value: int) -> None:
        _checked("copy_bytes", value, MIN_COPY_BYTES, MAX_COPY_BYTES)
        if value & (value - 1):
            raise ConfigError(f"copy_bytes {value} is no power of two")
        self._copy_bytes = value

    @property
    def polling_threads(self) -> int:
        """How many threads may poll for a moment (up to 100 µs) before they block: for storage, a client's next
        request, or a copy of another thread. Default: one less than the CPUs of the process; 0: none polls."""
        return polling_threads()

    @polling_threads.setter
    def polling_threads(self, value: int) -> None:
        set_polling_threads(_checked("polling_threads", value, 0, MAX_POLLING_THREADS))


limits = Limits()
