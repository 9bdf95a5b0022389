"""The options of a snapshot, checked in one place, and their QAPI form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import msgspec

from cbwcore.errors import ConfigError
from cbwcore.limits import limits
from cbwcore.policy import OnCbwError

if TYPE_CHECKING:
    from cbwcore.disk import Disk
    from cbwcore.snapshot import Snapshot

__all__ = ["BitmapRef", "SnapshotOptions"]

DEFAULT_CLUSTER_SIZE = 65536
MIN_CLUSTER_SIZE = 4096
MAX_CLUSTER_SIZE = 64 << 20
MAX_NAME_BYTES = 1023
MAX_TIMEOUT_NS = 2**62  # 146 years: what a longer timeout counts as


class BitmapRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """QAPI's BlockDirtyBitmap: a bitmap by name, and the node (disk) that has it."""

    node: str
    name: str


class _QapiCbw(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """QAPI's BlockdevOptionsCbw, as far as it means anything here."""

    file: str
    target: str
    bitmap: BitmapRef | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout: float = 0.0
    min_cluster_size: int = DEFAULT_CLUSTER_SIZE
    driver: str = "copy-before-write"
    node_name: str | None = None


class SnapshotOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `Disk.snapshot`, checked when made; raises ConfigError with the value and the limit.

    ``cluster_size`` (bytes): exact, a power of two from 4 KiB to 64 MiB. ``cbw_timeout`` (seconds): 0 is none.
    ``target_limit`` (bytes): beyond it a copy fails with ENOSPC. ``file`` is the disk that QAPI options named.
    """

    target: str | os.PathLike[str] | None = None
    name: str | None = None
    bitmap: Any = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout: float = 0.0
    cluster_size: int = DEFAULT_CLUSTER_SIZE
    target_limit: int | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        check_policy(self.on_cbw_error)
        timeout_ns(self.cbw_timeout)
        check_cluster_size(self.cluster_size)
        limit = self.target_limit
        if limit is not None and not (isinstance(limit, int) and 0 <= limit < 2**63):
            raise ConfigError(f"target_limit {limit!r} is no number of bytes in 0..{2**63 - 1}")
        if self.name is not None:
            check_name(self.name)

    @classmethod
    def from_qapi(cls, options: Mapping[str, Any]) -> Self:
        """Options from QEMU's ``blockdev-add`` arguments for its copy-before-write driver (QAPI BlockdevOptionsCbw).

        ``min-cluster-size`` becomes max(65536, value), as in QEMU. Unknown keys are refused by name (ConfigError)."""
        if not isinstance(options, Mapping):
            raise ConfigError(f"copy-before-write options are a mapping, not {type(options).__name__}")
        try:
            q = msgspec.convert(dict(options), _QapiCbw)
        except msgspec.ValidationError as e:
            raise ConfigError(f"copy-before-write options: {e}") from None
        if q.min_cluster_size < 0:
            raise ConfigError(f"min-cluster-size {q.min_cluster_size} is below 0")
        if q.driver != "copy-before-write":
            raise ConfigError(f"driver {q.driver!r} is not 'copy-before-write'")
        return cls(
            file=q.file,
            target=q.target,
            name=q.node_name,
            bitmap=q.bitmap,
            on_cbw_error=q.on_cbw_error,
            cbw_timeout=q.cbw_timeout,
            cluster_size=max(DEFAULT_CLUSTER_SIZE, q.min_cluster_size),
        )

    def take(self, disk: Disk) -> Snapshot:
        """`Disk.snapshot` with these options. A bitmap given by name is looked up in ``disk.bitmaps``; ``file`` and the
        bitmap's node say which disk that is to be, and the caller has found it."""
        return disk.snapshot(
            self.target,
            name=self.name,
            bitmap=self.bitmap,
            on_cbw_error=self.on_cbw_error,
            cbw_timeout=self.cbw_timeout,
            cluster_size=self.cluster_size,
            target_limit=self.target_limit,
        )


def check_policy(value: str) -> OnCbwError:
    """The policy of that name."""
    try:
        return OnCbwError(value)
    except ValueError:
        known = ", ".join(OnCbwError)
        raise ConfigError(f"on_cbw_error {value!r} is not one of {known}") from None


def timeout_ns(seconds: float) -> int:
    """A timeout in ns. 0 is none; any other length of time holds, and none wraps (QEMU's did at 4.29 s)."""
    if not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise ConfigError(f"cbw_timeout {seconds!r} is not a number of seconds from 0 on")
    if seconds >= MAX_TIMEOUT_NS / 1e9:
        return MAX_TIMEOUT_NS
    return max(int(seconds * 1e9), 1) if seconds else 0


def check_cluster_size(value: int) -> int:
    """The shift of a cluster size in bytes."""
    if not isinstance(value, int) or not MIN_CLUSTER_SIZE <= value <= MAX_CLUSTER_SIZE or value & (value - 1):
        raise ConfigError(f"cluster_size {value} is no power of two from {MIN_CLUSTER_SIZE} to {MAX_CLUSTER_SIZE}")
    if value > limits.copy_buffers:
        raise ConfigError(f"cluster_size {value} does not fit the copy buffers, {limits.copy_buffers} bytes")
    return value.bit_length() - 1


def check_name(name: str) -> str:
    """A snapshot's or bitmap's name: 1 to 1023 bytes of UTF-8, no NUL."""
    if not isinstance(name, str):
        raise ConfigError(f"name {name!r} is no string")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"name {name!r} is no UTF-8 text") from None
    if not 1 <= size <= MAX_NAME_BYTES or "\0" in name:
        raise ConfigError(f"name {name!r} is not 1 to {MAX_NAME_BYTES} bytes of UTF-8 without NUL ({size} bytes)")
    return name
