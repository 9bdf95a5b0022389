import os
import subprocess
from pathlib import Path

import pytest
from engine_support import Rig
from programs_support import need

import cbwcore
from cbwcore.engines import choose_engine

ENGINE = os.environ.get("CBWCORE_TEST_IO")  # as in tests/conftest.py


@pytest.fixture(params=[ENGINE] if ENGINE else ["psync", "io_uring"])
def rig(request, place, monkeypatch):
    """As `engine_support.rig`, over both engines: a fault at the I/O table must come to the same in each."""
    if choose_engine(request.param, direct=False)[0] != request.param:
        pytest.skip("no io_uring here")
    for module in (cbwcore.disk, cbwcore.snapshot):
        monkeypatch.setattr(
            module,
            "choose_engine",
            lambda io, *, direct=False: choose_engine(request.param if io == "auto" else io, direct=direct),
        )
    made = Rig(place)
    yield made
    made.close()


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The library that counts calls and makes one fail, for LD_PRELOAD: sweep/shim.c."""
    need("gcc")
    library = tmp_path_factory.mktemp("sweep") / "shim.so"
    source = Path(__file__).with_name("sweep") / "shim.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=60)
    return library
