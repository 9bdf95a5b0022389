"""The on-cbw-error policy and the states of a snapshot.

=========  ======================================  ==========================================
state      guest writes                            snapshot reads
=========  ======================================  ==========================================
armed      pass copy-before-write first            T0 data
broken     go straight to the disk                 SnapshotBrokenError, for good
closed     go straight to the disk                 ValueError
=========  ======================================  ==========================================

armed → broken: a copy failed or timed out under break-snapshot. armed, broken → closed: close(). Nothing leads
back. The core makes the first step at once, in the guest's thread and without the GIL (R7); what is here keeps the
first cause and tells of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from cbwcore.errors import CopyBeforeWriteError

if TYPE_CHECKING:
    from cbwcore.snapshot import Snapshot

__all__ = ["OnCbwError", "SnapshotState", "tell_break"]

logger = logging.getLogger(__name__)


class OnCbwError(StrEnum):
    """What happens when old data cannot be copied (QEMU's ``on-cbw-error``)."""

    BREAK_GUEST_WRITE = "break-guest-write"
    """The guest write fails, the disk is unchanged, the snapshot stays valid."""
    BREAK_SNAPSHOT = "break-snapshot"
    """The guest write goes on; the snapshot, and every reader of it, fails from then on."""


class SnapshotState(StrEnum):
    """See the table of this module."""

    ARMED = "armed"
    BROKEN = "broken"
    CLOSED = "closed"


def tell_break(snapshot: Snapshot, cause: CopyBeforeWriteError, on_break: Callable[[Snapshot], object] | None) -> None:
    """Log a break and call its callback; whatever the callback raises is logged and stays with it."""
    logger.error("%s: snapshot %r is broken: %s", snapshot.disk.path, snapshot.name, cause)
    if on_break is None:
        return
    try:
        on_break(snapshot)
    except Exception:
        logger.exception("the on_break callback of snapshot %s failed", snapshot.name)
