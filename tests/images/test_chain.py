"""A chain with a missing, changed or exchanged parent is refused, and the error names the file."""

import json
import os
import shutil

import pytest
from images_support import UNIT, backup, changed, layout

import cbwcore
from cbwcore import StateError
from cbwcore.images.chain import ancestors, open_chain
from cbwcore.images.manifest import manifest_path

SIZE = 12 * UNIT + 100


@pytest.fixture
def chain(place, rng):
    """full, mon and tue in ``place``; the contents of each. ``full`` is a part of another chain's, too."""
    contents = [layout(rng, SIZE)]
    backup(place / "full", contents[0], compress="zstd")
    for name, parent in (("mon", "full"), ("tue", "mon")):
        new, dirty = changed(rng, contents[-1])
        new = b"\1" + new[1:]
        backup(place / name, new, dirty=sorted({0, *dirty}), backing=place / parent)
        contents.append(new)
    return contents


def move(place, old, new):
    os.rename(place / old, place / new)
    os.rename(manifest_path(place / old), manifest_path(place / new))


def edit(place, name, **fields):
    path = manifest_path(place / name)
    with open(path) as f:
        found = json.load(f)
    with open(path, "w") as f:
        json.dump(found | fields, f)


def assert_refused(place, *words):
    """By restore and by verify, before anything was written; in one line with those words."""
    for call in (
        lambda: cbwcore.verify_backup(place / "tue"),
        lambda: cbwcore.restore(place / "tue", place / "restored"),
    ):
        with pytest.raises(StateError) as e:
            call()
        for word in words:
            assert str(word) in str(e.value)
        assert "\n" not in str(e.value)
    assert not any(name.startswith("restored") for name in os.listdir(place))


def test_each_of_a_chain_restores(place, chain):
    for name, content in zip(("full", "mon", "tue"), chain, strict=True):
        cbwcore.restore(place / name, place / "restored", overwrite=True, verify=True)
        assert (place / "restored").read_bytes() == content


def test_who_is_in_a_chain(place, chain):
    with open_chain(place / "tue") as found:
        assert [os.path.basename(m.path) for m in found.members] == ["tue", "mon", "full"]
        assert found.complete
    names = ("tue", "tue.cbw.json", "mon", "mon.cbw.json", "full", "full.cbw.json")
    assert ancestors(str(place / "tue")) == [str(place / name) for name in names]
    assert ancestors(str(place / "none")) == [str(place / "none"), str(place / "none.cbw.json")]


@pytest.mark.parametrize("name", ["full", "mon"])
def test_a_missing_parent(place, chain, name):
    move(place, name, "elsewhere")
    assert_refused(place, place / name, "is missing", place / {"full": "mon", "mon": "tue"}[name])


@pytest.mark.parametrize("name", ["full", "mon"])
def test_a_parent_without_its_manifest(place, chain, name):
    os.unlink(manifest_path(place / name))
    assert_refused(place, place / name, "is no finished backup: it has no manifest")


def test_itself_missing_or_without_its_manifest(place, chain):
    os.rename(place / "tue", place / "gone")
    assert_refused(place, place / "tue", "is missing: only its manifest is there")
    os.unlink(manifest_path(place / "tue"))
    assert_refused(place, place / "tue", "is no finished backup")


@pytest.mark.parametrize("name", ["full", "mon", "tue"])
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_byte_that_changed(place, rng, name, format):
    """Of the data of any of them; the error tells which."""
    content = layout(rng, SIZE, data=1)
    backup(place / "full", content, format=format)
    backup(place / "mon", content, dirty=[1], backing=place / "full")
    backup(place / "tue", content, dirty=[2], backing=place / "mon")
    at = os.path.getsize(place / name) - 100 if (name, format) == ("full", "raw") else UNIT + 77
    with open(place / name, "r+b") as f:
        f.seek(at)
        byte = f.read(1)
        f.seek(at)
        f.write(bytes([byte[0] ^ 1]))
    assert_refused(place, place / name, "is damaged")


@pytest.mark.parametrize("change", ["longer", "shorter"])
@pytest.mark.parametrize("name", ["full", "tue"])
def test_a_size_that_changed(place, chain, name, change):
    size = os.path.getsize(place / name)
    os.truncate(place / name, size + (1 if change == "longer" else -1))
    assert_refused(place, place / name, f"had {size} when it was written")


def test_a_parent_that_was_written_again(place, chain):
    """The same content, at the same place: still another backup, and the epochs of its bitmap are others."""
    backup(place / "full", chain[0], compress="zstd", overwrite=True)
    assert_refused(place, place / "full", "is not the parent of", place / "mon")


def test_parents_that_were_exchanged(place, chain):
    move(place, "full", "x")
    move(place, "mon", "full")
    move(place, "x", "mon")
    assert_refused(place, place / "mon", "is not the parent of", place / "tue")


def test_images_that_were_exchanged_but_not_their_manifests(place, chain):
    os.rename(place / "full", place / "x")
    os.rename(place / "mon", place / "full")
    os.rename(place / "x", place / "mon")
    assert_refused(place, place / "mon")


def test_images_of_one_size_that_were_exchanged(place, rng):
    content = layout(rng, SIZE, data=1)
    backup(place / "a", content)
    backup(place / "tue", content)
    os.rename(place / "a", place / "tue")
    assert_refused(place, place / "tue", "is backup", "and its manifest is of")


def test_a_backing_file_that_was_changed_by_others(place, chain):
    edit(place, "tue", parent={"id": "f" * 32, "file": "full"})
    assert_refused(place, place / "tue", "has the backing file mon, and its manifest names full")
    edit(place, "tue", parent=None)
    assert_refused(place, place / "tue", "has the backing file mon, and its manifest names None")


def test_a_manifest_with_another_parent(place, chain):
    edit(place, "tue", parent={"id": "f" * 32, "file": "mon"})
    assert_refused(place, place / "mon", "is not the parent of", "f" * 32)


def test_a_parent_of_another_size(place, chain):
    edit(place, "full", size=SIZE + 1)
    assert_refused(place, place / "full", str(SIZE))


def test_a_chain_that_bites_its_tail(place, chain):
    """Ids and names that fit, round and round."""
    with open(manifest_path(place / "tue")) as f:
        tue = json.load(f)
    os.unlink(place / "mon")
    os.unlink(manifest_path(place / "mon"))
    (place / "mon").symlink_to("tue")
    edit(place, "tue", parent={"id": tue["id"], "file": "mon"})
    assert_refused(place, place / "tue", "is a part of the chain above it already")


def test_a_full_backup_with_a_parent(place, chain):
    edit(place, "tue", sync="full")
    assert_refused(place, place / "tue", "a full backup with a parent")


def test_a_raw_image_with_a_parent(place, rng):
    backup(place / "tue", layout(rng, SIZE), format="raw")
    edit(place, "tue", parent={"id": "f" * 32, "file": "mon"})
    assert_refused(place, place / "tue", "its manifest names mon")


def test_a_raw_manifest_of_two_sizes(place, rng):
    backup(place / "tue", layout(rng, SIZE), format="raw")
    edit(place, "tue", size=SIZE - 1)
    assert_refused(place, place / "tue", "damaged")


def test_an_image_that_is_no_file(place, rng):
    backup(place / "tue", layout(rng, SIZE))
    os.unlink(place / "tue")
    os.mkfifo(place / "tue")
    assert_refused(place, place / "tue", "neither a regular file nor a block device")


def test_an_image_in_use(place, chain):
    """Somebody writes to it: a QEMU with that disk, say."""
    with cbwcore.Disk(place / "mon"):
        assert_refused(place, place / "mon", "in use")


def test_partial_backups_without_a_parent(place, rng):
    content = layout(rng, SIZE)
    backup(place / "tue", content, sync="bitmap", dirty=[1, 2])
    assert not cbwcore.verify_backup(place / "tue").complete
    with pytest.raises(StateError, match="backup of sync bitmap without a parent"):
        cbwcore.restore(place / "tue", place / "restored")
    assert not (place / "restored").exists()


def test_a_chain_that_was_moved_as_a_whole(place, chain):
    (place / "away").mkdir()
    for name in ("full", "mon", "tue"):
        shutil.move(place / name, place / "away")
        shutil.move(manifest_path(place / name), place / "away")
    cbwcore.restore(place / "away" / "tue", place / "restored")
    assert (place / "restored").read_bytes() == chain[-1]


def test_by_a_link(place, chain):
    (place / "links").mkdir()
    (place / "links" / "latest").symlink_to("../tue")
    cbwcore.restore(place / "links" / "latest", place / "restored")
    assert (place / "restored").read_bytes() == chain[-1]


def test_a_long_chain(place, rng):
    content = layout(rng, 4 * UNIT)
    backup(place / "0", content)
    for i in range(1, 60):
        content = content[: i % 4 * UNIT] + rng.randbytes(UNIT) + content[(i % 4 + 1) * UNIT :]
        backup(place / f"{i}", content, dirty=[i % 4], backing=place / f"{i - 1}")
    cbwcore.restore(place / "59", place / "restored", verify=True)
    assert (place / "restored").read_bytes() == content
