"""The build itself: an edit of a part rebuilds the core, and off Linux it fails with a clear word."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent  # cmake, ninja and cython of the test extra


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build reads."""
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def cmake(tree, *arguments):
    return subprocess.run([SCRIPTS / "cmake", *arguments], cwd=tree, capture_output=True, text=True, check=False)


def configure(tree, *definitions):
    paths = [f"-DCMAKE_MAKE_PROGRAM={SCRIPTS / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}"]
    return cmake(tree, "-S", ".", "-B", "build", "-G", "Ninja", *paths, *definitions)


def test_an_edit_of_any_part_transpiles_the_core_again(tree):
    assert configure(tree).returncode == 0
    assert "Transpiling" in cmake(tree, "--build", "build", "--target", "_cbwcore.c").stdout
    assert "no work to do" in cmake(tree, "--build", "build", "--target", "_cbwcore.c").stdout
    parts = sorted((tree / "src" / "cbwcore").glob("*.px[di]"))
    assert len(parts) > 20
    for part in parts:
        before = part.stat()
        os.utime(part)
        again = cmake(tree, "--build", "build", "--target", "_cbwcore.c", "--", "-n")
        assert "Transpiling" in again.stdout, (part.name, again.stdout)
        os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "no work to do" in cmake(tree, "--build", "build", "--target", "_cbwcore.c", "--", "-n").stdout


@pytest.mark.parametrize("wanted", ["off", "auto", "on"])
def test_without_liburing_the_build_says_so_and_has_psync_alone(tree, wanted):
    """Of a machine that has it, too: it is looked for where it is not."""
    hidden = ["-DLIBURING_LIBRARY=LIBURING_LIBRARY-NOTFOUND", "-DCMAKE_DISABLE_FIND_PACKAGE_PkgConfig=ON"]
    nowhere = [f"-DCMAKE_FIND_ROOT_PATH={tree / 'nothing'}", "-DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY"]
    configured = configure(tree, f"-DCBWCORE_IO_URING={wanted}", *hidden, *nowhere)
    told = " ".join(configured.stderr.split())
    if wanted == "on":
        assert configured.returncode != 0
        assert "io_uring was asked for, and liburing was not found" in told
        return
    assert configured.returncode == 0, told
    assert ("liburing was not found" in told) == (wanted == "auto")
    assert "CBW_LIBURING" not in (tree / "build" / "build.ninja").read_text()


def test_off_linux_the_build_says_what_it_needs(tree):
    refused = configure(tree, "-DCMAKE_SYSTEM_NAME=Darwin")
    assert refused.returncode != 0
    assert re.search(r"cbwcore needs Linux.*Darwin", refused.stderr.replace("\n", " "))


def test_the_product_has_nothing_of_the_scheduler():
    """CBWCORE_YIELD is for tests/schedules alone: the core that is installed knows no word of it."""
    import cbwcore._cbwcore as core

    assert b"cs_point" not in Path(core.__file__).read_bytes()
