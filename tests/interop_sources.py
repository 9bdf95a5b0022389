"""Debian packages that are fetched with apt, unpacked and built in a cache; nothing of them is installed.

apt runs with lists of its own, so that neither the machine's configuration nor its lists change, and checks what it
fetches against the archive's signatures. What is missing is a RuntimeError: see `needs` in tests/conftest.py.
"""

import contextlib
import fcntl
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

LIMIT = 120  # seconds for one program
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def command(*words, cwd=None):
    """The output of a program; RuntimeError with what it said if it fails, hangs or does not exist."""
    words = [str(word) for word in words]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise RuntimeError(f"{words[0]}: {e}") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


# ---- the cache ----


def cache():
    """The directory of this user and release: programs built for one release may not run on another."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    release = platform.freedesktop_os_release()
    return Path(home) / "cbwcore-tests" / f"{release.get('ID', 'linux')}{release.get('VERSION_ID', '')}"


def cached(name, make):
    """The directory ``name`` of the cache, made by ``make(directory)`` the first time: all of it, or nothing."""
    root = cache()
    root.mkdir(parents=True, exist_ok=True)
    done = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once
        if not done.exists():
            with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=root) as unfinished:
                content = Path(unfinished, "content")
                content.mkdir()
                make(content)
                content.rename(done)
    return done


# ---- apt ----


class Apt:
    """apt-get with lists of its own in ``home``."""

    def __init__(self, home, sources):
        for folder in ("lists/partial", "cache/archives/partial"):
            (home / folder).mkdir(parents=True)
        (home / "sources.list").write_text("".join(f"{line}\n" for line in sources))
        self._options = [
            f"-oDir::Etc::SourceList={home}/sources.list",
            "-oDir::Etc::SourceParts=/dev/null",
            f"-oDir::State::Lists={home}/lists",
            f"-oDir::Cache={home}/cache",
            "-oAcquire::Retries=3",
            "-oAPT::Update::Error-Mode=any",
            "-qq",
        ]
        command("apt-get", *self._options, "update")

    def source(self, package, directory):
        """The upstream sources of a package, unpacked there without Debian's patches."""
        command("apt-get", *self._options, "source", "--download-only", package, cwd=directory)
        (tarball,) = directory.glob("*.orig.tar.?z")
        with tarfile.open(tarball) as tar:
            tar.extractall(directory, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        for left in directory.glob(f"{package}_*"):
            left.unlink()

    def unpack(self, package, directory):
        """The files of a binary package, as they would be under ``/``."""
        command("apt-get", *self._options, "download", package, cwd=directory)
        (archive,) = directory.glob("*.deb")
        command("dpkg", "-x", archive, directory)
        archive.unlink()

    def dependency(self, package, pattern):
        """The first dependency of a package that matches."""
        shown = command("apt-cache", *self._options, "show", package)
        found = re.search(rf"^Depends:.*?({pattern})", shown, re.MULTILINE)
        if not found:
            raise RuntimeError(f"{package} depends on no {pattern}")
        return found[1]


def archives():
    """(URI, release) of the Debian archives that this machine uses, whichever way they are configured."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    shown = command(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"
    )
    found = [line.split() for line in shown.splitlines()]
    found = [(uri, release) for uri, release, part in found if part == "main" and release.startswith(codename)]
    if not found:
        raise RuntimeError("apt has no Debian archive")
    return list(dict.fromkeys(found))


def sources_list(kind, places):
    """Lines of a sources.list: ``deb`` or ``deb-src``."""
    return [f"{kind} [signed-by={KEYRING}] {uri} {release} main" for uri, release in places]


@contextlib.contextmanager
def apt(sources):
    """An `Apt` for one use."""
    with tempfile.TemporaryDirectory(prefix="cbwcore-apt-") as home:
        yield Apt(Path(home), sources)


# ---- what the tests use of them ----


def headers():
    """Headers of the libraries that the programs are built with: the include paths."""

    def make(directory):
        with apt(sources_list("deb", archives())) as packages:
            for package in ("libnbd-dev", "libglib2.0-dev", "libgnutls28-dev"):
                packages.unpack(package, directory)

    usr = cached("headers", make) / "usr"
    return [usr / "include", usr / "include/glib-2.0", *usr.glob("lib/*/glib-2.0/include")]


def nbd_tester_client():
    """The directory of nbd's tests, with nbd-tester-client built in it.

    It is of Debian 13: not every mirror has the sources of Debian 12's nbd 3.24, whose archive they list."""

    def make(directory):
        with apt(sources_list("deb-src", [(archives()[0][0], "trixie")])) as packages:
            packages.source("nbd", directory)
        (nbd,) = directory.glob("nbd-*")
        config = "#define SIZEOF_UNSIGNED_INT 4\n#define SIZEOF_UNSIGNED_LONG_LONG_INT 8\n"
        config += "".join(
            f"#define {name} 1\n" for name in ("HAVE_GNUTLS", "HAVE_MKSTEMP", "HAVE_FDATASYNC", "ISSERVER")
        )
        (nbd / "config.h").write_text(config)
        files = ["tests/run/nbd-tester-client.c", "cliserv.c", "buffer.c", "crypto-gnutls.c"]
        compile_c(
            nbd / "tests/run/nbd-tester-client", [nbd / file for file in files], [nbd], [], ["glib-2.0", "gnutls"]
        )
        for file in (nbd / "tests/run").iterdir():
            file.rename(directory / file.name)
        shutil.rmtree(nbd)

    return cached("nbd-tester-client", make)


def libnbd():
    """The upstream sources of libnbd: those of the release's libnbd, whose library and headers are used, too."""

    def make(directory):
        with apt(sources_list("deb-src", archives())) as packages:
            packages.source("libnbd", directory)
        (directory / "config.h").write_text("#define HAVE_GNUTLS 1\n")

    return cached("libnbd", make)


def guest_files():
    """``boot/`` and ``lib/modules/`` of a Debian kernel for virtual machines; a ``bin/busybox`` without libraries."""

    def make(directory):
        with apt(sources_list("deb", archives())) as packages:
            kernel = packages.dependency("linux-image-cloud-amd64", r"linux-image-\S+-cloud-amd64")
            for package in (kernel, "busybox-static"):
                packages.unpack(package, directory)
        shutil.rmtree(directory / "usr")  # documentation

    return cached("guest", make)


def compile_c(output, sources, includes, defines, libraries):
    """Compile a program against the fetched headers and the machine's libraries of the same release."""
    command(
        "gcc",
        *("-O1", "-w", "-D_GNU_SOURCE", "-o", output),
        *(f"-I{path}" for path in [*includes, *headers()]),
        *(f"-D{define}" for define in defines),
        *sources,
        *(f"-l:lib{name}.so.{SONAMES[name]}" for name in libraries),
        "-lpthread",
    )


SONAMES = {"glib-2.0": 0, "gnutls": 30, "nbd": 0}
