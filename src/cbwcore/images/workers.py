"""Working through pieces on several cores, with memory for as many pieces as there are threads."""

from __future__ import annotations

import contextlib
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
    threads: list[threading.Thread] = []
    try:
        with contextlib.suppress(RuntimeError):  # no more threads to be had: those that there are do it
            for _ in range(count):
                thread = threading.Thread(target=run, name="cbwcore-image", daemon=True)
                thread.start()
                threads.append(thread)
        if not threads:
            run()
        for thread in threads:
            thread.join()
    except BaseException as e:  # KeyboardInterrupt
        errors.append(e)
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
