"""The options of a backup job, and which of them go together; checked in one place, by QEMU's rules where it has
them."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Any, NoReturn, TypeVar

import msgspec

from cbwcore.errors import ConfigError
from cbwcore.images.output import Compression, Format
from cbwcore.options import SnapshotOptions, check_policy, timeout_ns
from cbwcore.policy import OnCbwError

__all__ = ["BackupOptions", "BitmapMode", "OnError", "Sync"]

Word = TypeVar("Word", bound=StrEnum)
UNIT = 65536  # what outputs store at least
MAX_CHUNK = 64 << 20
MAX_WORKERS = 64
MAX_SPEED = 2**62


class Sync(StrEnum):
    """Which parts of the disk are copied (QEMU's MirrorSyncMode)."""

    FULL = "full"
    """All of it."""
    INCREMENTAL = "incremental"
    """What the bitmap has; on success the bitmap has what was written since."""
    BITMAP = "bitmap"
    """What the bitmap has; ``bitmap_mode`` says what becomes of it."""
    NONE = "none"
    """Nothing: the snapshot is held for clients that read it (fleecing)."""


class BitmapMode(StrEnum):
    """What becomes of the bitmap at the end of the job (QEMU's BitmapSyncMode)."""

    ON_SUCCESS = "on-success"
    """After success it has what was written since T0; else that is added to it."""
    NEVER = "never"
    """What was written since T0 is added to it."""
    ALWAYS = "always"
    """It has what was written since T0 and what was not copied, even after a failure; then the partial image is
    kept."""


class OnError(StrEnum):
    """What the job does after an error (QEMU's BlockdevOnError)."""

    REPORT = "report"
    """It fails."""
    IGNORE = "ignore"
    """It goes on, and tries that part again later, until it succeeds or is cancelled."""
    ENOSPC = "enospc"
    """It stops for ENOSPC, and fails for anything else."""
    STOP = "stop"
    """It pauses; resume() tries again."""


class BackupOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `Disk.backup`, checked when made; raises ConfigError with the value and the rule.

    ``target``: the image to be made; for sync "none", where old data goes. ``format``: "raw" or "qcow2"; None: by the
    name. ``compress``: None or "zstd". ``backing``: the image of the backup that this one builds on. ``fallback``:
    "full" where an incremental one is not possible. ``speed``: bytes a second, 0 for no limit. ``chunk_size``: bytes
    read at once. ``fleece``, ``fleece_limit``, ``cluster_size``, ``on_cbw_error``, ``cbw_timeout``: the snapshot's
    target, target_limit and so on. ``manifest``: where the manifest goes if the target is a block device.
    """

    target: Any = None
    sync: Sync = Sync.FULL
    bitmap: str | None = None
    bitmap_mode: BitmapMode | None = None
    format: Format | None = None
    compress: Compression | None = None
    backing: Any = None
    fallback: str | None = None
    overwrite: bool = False
    verify: bool = False
    manifest: Any = None
    speed: int = 0
    workers: int = 2
    chunk_size: int = 1 << 20
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    name: str | None = None
    fleece: Any = None
    fleece_limit: int | None = None
    cluster_size: int = 65536
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout: float = 0.0

    @classmethod
    def make(cls, target: str | os.PathLike[str] | None, **options: Any) -> BackupOptions:
        """From keyword arguments, with the words for the enums. ConfigError, TypeError for a name that is no option."""
        words = {
            "sync": Sync,
            "bitmap_mode": BitmapMode,
            "on_source_error": OnError,
            "on_target_error": OnError,
        }
        for name, kind in words.items():
            if options.get(name) is not None:
                options[name] = check_word(name, kind, options[name])
        if "on_cbw_error" in options:
            options["on_cbw_error"] = check_policy(options["on_cbw_error"])
        return cls(target=target, **options)

    def __post_init__(self) -> None:
        self._check_values()
        self._check_bitmap()
        if self.sync == Sync.NONE:
            self._check_fleecing()
        else:
            self._check_image()
        self.snapshot_options(None)  # its checks

    @property
    def layered(self) -> bool:
        """Whether the image holds only what the bitmap has, on top of another."""
        return self.sync in (Sync.INCREMENTAL, Sync.BITMAP)

    @property
    def image_format(self) -> Format:
        """The format, by the target's name where none is given."""
        return self.format or ("qcow2" if os.fsdecode(self.target).endswith(".qcow2") else "raw")

    @property
    def mode(self) -> BitmapMode:
        """What becomes of the bitmap; on-success where nothing is said."""
        return self.bitmap_mode or BitmapMode.ON_SUCCESS

    def snapshot_options(self, scope: Any) -> SnapshotOptions:
        """The job's snapshot's, limited to ``scope``."""
        return SnapshotOptions(
            target=self.target if self.sync == Sync.NONE else self.fleece,
            name=self.name,
            bitmap=scope,
            on_cbw_error=self.on_cbw_error,
            cbw_timeout=self.cbw_timeout,
            cluster_size=self.cluster_size,
            target_limit=self.fleece_limit,
        )

    def _check_values(self) -> None:
        timeout_ns(self.cbw_timeout)
        check_number("speed", self.speed, 0, MAX_SPEED)
        check_number("workers", self.workers, 1, MAX_WORKERS)
        check_number("chunk_size", self.chunk_size, UNIT, MAX_CHUNK)
        if self.chunk_size % UNIT:
            refuse(f"chunk_size {self.chunk_size} is no multiple of {UNIT}")
        if self.format not in (None, "raw", "qcow2"):
            refuse(f"format {self.format!r} is neither raw nor qcow2")
        if self.compress not in (None, "zstd"):
            refuse(f"compress {self.compress!r} is not zstd")
        if self.fallback not in (None, "full"):
            refuse(f"fallback {self.fallback!r} is not full")

    def _check_bitmap(self) -> None:
        if self.bitmap is None:
            if self.layered:
                refuse(f"sync {self.sync} needs a bitmap")
            if self.bitmap_mode is not None:
                refuse(f"bitmap_mode {self.bitmap_mode} needs a bitmap")
        if self.sync == Sync.BITMAP and self.bitmap_mode is None:
            refuse("sync bitmap needs a bitmap_mode")
        if self.sync == Sync.INCREMENTAL and self.mode != BitmapMode.ON_SUCCESS:
            refuse(f"sync incremental has bitmap_mode on-success, not {self.mode}")
        if self.sync == Sync.FULL and self.bitmap_mode == BitmapMode.NEVER:
            refuse("bitmap_mode never has no effect with sync full")
        if self.sync == Sync.NONE and self.bitmap_mode == BitmapMode.ALWAYS:
            refuse("bitmap_mode always has no effect with sync none: it copies nothing itself")

    def _check_fleecing(self) -> None:
        for name in ("format", "compress", "backing", "fallback", "manifest", "fleece"):
            if getattr(self, name) is not None:
                refuse(f"{name} has no effect with sync none: it makes no image")
        if self.verify or self.overwrite:
            refuse(f"{'verify' if self.verify else 'overwrite'} has no effect with sync none: it makes no image")

    def _check_image(self) -> None:
        if self.target is None:
            refuse(f"sync {self.sync} needs a target")
        if self.compress is not None and self.image_format != "qcow2":
            refuse(f"compress {self.compress} needs format qcow2, not {self.image_format}")
        if not self.layered:
            for name in ("backing", "fallback"):
                if getattr(self, name) is not None:
                    refuse(f"{name} has no effect with sync full")
            return
        if self.image_format != "qcow2":
            refuse(f"sync {self.sync} needs format qcow2, which can have a backing file, not {self.image_format}")
        if self.backing is None:
            refuse(f"sync {self.sync} needs backing, the image of the backup that it builds on")
        if self.cluster_size < UNIT:
            refuse(f"sync {self.sync} needs a cluster_size of {UNIT} or more, not {self.cluster_size}")


def check_word(name: str, kind: type[Word], value: str) -> Word:
    """The member of that name; ConfigError says which there are."""
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name} {value!r} is not one of {', '.join(kind)}") from None


def check_number(name: str, value: int, least: int, most: int) -> None:
    """An integer of a range, or ConfigError."""
    if not isinstance(value, int) or not least <= value <= most:
        refuse(f"{name} {value!r} is outside {least}..{most}")


def refuse(text: str) -> NoReturn:
    """Options that mean nothing, or not together."""
    raise ConfigError(text)
