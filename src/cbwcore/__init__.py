"""cbwcore: copy-before-write snapshots of block storage, in user space.

A guest goes on writing its disk; before a cluster is overwritten its old data is copied to a target; the snapshot stays
readable as the disk was at T0.
"""

import logging

from cbwcore.backup import (
    BackupJob,
    BackupOptions,
    BackupResult,
    BitmapMode,
    JobEvent,
    JobStatus,
    OnError,
    Sync,
    backup_group,
)
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.disk import Disk
from cbwcore.errors import (
    CbwError,
    ConfigError,
    CopyBeforeWriteError,
    JobCancelledError,
    SnapshotAccessError,
    SnapshotBrokenError,
    StateError,
)
from cbwcore.extents import Extent
from cbwcore.images.restore import RestoreResult, VerifyResult, restore, verify_backup
from cbwcore.limits import limits
from cbwcore.nbd import NbdLimits, NbdServer, TlsConfig
from cbwcore.options import SnapshotOptions
from cbwcore.policy import OnCbwError, SnapshotState
from cbwcore.snapshot import Snapshot, snapshot_group
from cbwcore.stats import DiskStats, SnapshotStats

__all__ = [
    "BackupJob",
    "BackupOptions",
    "BackupResult",
    "BitmapMode",
    "CbwError",
    "ConfigError",
    "CopyBeforeWriteError",
    "DirtyBitmap",
    "Disk",
    "DiskStats",
    "Extent",
    "JobCancelledError",
    "JobEvent",
    "JobStatus",
    "NbdLimits",
    "NbdServer",
    "OnCbwError",
    "OnError",
    "RestoreResult",
    "Snapshot",
    "SnapshotAccessError",
    "SnapshotBrokenError",
    "SnapshotOptions",
    "SnapshotState",
    "SnapshotStats",
    "StateError",
    "Sync",
    "TlsConfig",
    "VerifyResult",
    "backup_group",
    "limits",
    "restore",
    "snapshot_group",
    "verify_backup",
]
__version__ = "0.1.0"

logging.getLogger("cbwcore").addHandler(logging.NullHandler())  # what is logged, and where, is the application's choice
