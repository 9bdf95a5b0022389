"""The handshake fuzzer (handshake.py) under atheris: libFuzzer with the coverage of the handshake's Python code.

Arguments are libFuzzer's; a file is replayed. run.sh runs it.
"""

from __future__ import annotations

import random
import struct
import sys

import atheris

with atheris.instrument_imports(include=["cbwcore.nbd"]):
    import cbwcore.nbd.handshake  # noqa: F401

from fuzz import handshake

NAMES = [b"", b"disk", b"snapshot", b"n" * 1023, b"n" * 1024, b"\xff", b"a\0b", b"x" * 4097]
QUERIES = [b"base:allocation", b"base:", b"qemu:", b"qemu:dirty-bitmap:", b"qemu:dirty-bitmap:b", b"", b"\xc3"]
OPTIONS = [*range(1, 12), 99]


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def payload(option: int, rng: random.Random) -> bytes:
    """One that fits the option, more or less."""
    if option == 1:
        return rng.choice(NAMES)
    if option in (6, 7):
        infos = [rng.randrange(5) for _ in range(rng.randrange(4))]
        return string(rng.choice(NAMES)) + struct.pack(f">H{len(infos)}H", len(infos), *infos)
    if option in (9, 10):
        queries = rng.choices(QUERIES, k=rng.randrange(5))
        count = len(queries) if rng.randrange(8) else rng.randrange(2**32)
        return string(rng.choice(NAMES)) + struct.pack(">I", count) + b"".join(map(string, queries))
    return rng.randbytes(rng.choice((0, 0, 0, 5, 300)))


def option(rng: random.Random) -> bytes:
    number = rng.choice(OPTIONS)
    data = payload(number, rng)
    length = len(data) if rng.randrange(12) else rng.randrange(2**32)
    return b"IHAVEOPT" + struct.pack(">II", number, length) + data


def places(data: bytes) -> list[int]:
    """Where options begin."""
    found, at = [], data.find(b"IHAVEOPT")
    while at >= 0:
        found.append(at)
        at = data.find(b"IHAVEOPT", at + 8)
    return [*found, len(data)]


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Half are left to libFuzzer, which knows no options."""
    rng = random.Random(seed)
    if len(data) < 5 or rng.randrange(2):
        return bytes(atheris.Mutate(data, most)) if data else b"\0\0\0\0\3"
    at = rng.choice(places(data))
    choice = rng.randrange(5)
    if choice == 0:
        data = bytes([rng.randrange(256)]) + data[1:]
    elif choice == 1:
        later = [place for place in places(data) if place > at]
        data = data[:at] + (data[later[0] :] if later else b"")
    else:
        data = data[:at] + option(rng) + data[at:]
    return data[:most]


def main() -> None:
    server = handshake.Server()

    def check(data: bytes) -> None:
        server.check(data)

    atheris.Setup(sys.argv, check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
