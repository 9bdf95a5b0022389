"""The command, a disk for it, and a look at what it leaves behind."""

import contextlib
import os

import pytest
from engine_support import pattern
from serve_support import SIZE, Serving


@pytest.fixture
def serve():
    """``serve(*arguments)``: the command; killed at the end if it still runs."""
    with contextlib.ExitStack() as undo:

        def start(*arguments, **options):
            serving = Serving(*arguments, **options)
            undo.callback(serving.close)
            return serving

        yield start


@pytest.fixture
def image(place):
    """A disk image; its content is ``pattern(SIZE)``."""
    path = place / "disk.img"
    path.write_bytes(pattern(SIZE))
    return path


@pytest.fixture
def left(place, image):
    """``left()``: what is in the directory besides the disk."""
    return lambda: sorted(set(os.listdir(place)) - {image.name})


@pytest.fixture
def path(place):
    return str(place / "socket")
