"""What a child of os.fork() must let go of.

The child has the disks' descriptors, but neither their threads nor a say in their locks. It closes them at once: else
the parent's close() would leave block devices claimed and files locked for as long as the child lives.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["forked"]


class Abandonable(Protocol):
    """A disk or a snapshot."""

    def _abandon(self) -> None: ...


forked: weakref.WeakSet[Abandonable] = weakref.WeakSet()
"""Every disk and snapshot that has open descriptors, and some that had."""


def _abandon_all() -> None:
    for each in list(forked):
        each._abandon()


os.register_at_fork(after_in_child=_abandon_all)
