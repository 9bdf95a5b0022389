"""Backup jobs: a snapshot is copied into an image while the guest writes on.

options.py what goes together · epoch.py is the bitmap enough · plan.py what is copied · group.py one T0, and the start
· job.py the workers and the end · control.py pause and speed · events.py what is told
"""

from cbwcore.backup.events import JobEvent, JobStatus
from cbwcore.backup.group import backup_group
from cbwcore.backup.job import BackupJob, BackupResult
from cbwcore.backup.options import BackupOptions, BitmapMode, OnError, Sync

__all__ = [
    "BackupJob",
    "BackupOptions",
    "BackupResult",
    "BitmapMode",
    "JobEvent",
    "JobStatus",
    "OnError",
    "Sync",
    "backup_group",
]
