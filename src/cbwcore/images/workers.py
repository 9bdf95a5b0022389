"""Working through pieces on several cores, with memory for as many pieces as there are threads."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from cbwcore.images.kinds import PIECE

__all__ = ["work_through"]

T = TypeVar("T")
MOST_THREADS = 4


def work_through(pieces: Iterator[T], work: Callable[[T, memoryview], None], buffers: int = 1) -> None:
    """Call ``work(piece, buffer)`` for each of ``pieces``, begun in order, in several threads; ``buffer``: ``buffers``
    MiB for this call. The first exception, of ``pieces`` too, stops all of it and is raised once they have stopped."""
    lock = threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            buffer = memoryview(mmap.mmap(-1, buffers * PIECE))
            while not errors:
                with lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                work(piece, buffer)
        except BaseException as e:
            errors.append(e)

    count = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    threads = [threading.Thread(target=run, name="cbwcore-image", daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as e:  # KeyboardInterrupt, or no more threads
        errors.append(e)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]
