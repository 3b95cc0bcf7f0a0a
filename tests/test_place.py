"""Where a checkpoint may be: file systems, mounts of a single file, hard links."""

import ast
import asyncio
import os
import re
import shutil
import sqlite3
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from command import bulkwf, emulator, ids, write_rows
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import fill, start

import bulkwf as package
from bulkwf.checkpoint import file, place, read_results
from bulkwf.checkpoint.place import CLASSES, KINDS, filesystem_class, filesystem_of, is_mount_point
from bulkwf.errors import CheckpointError

pytestmark = pytest.mark.slow

MOUNTS = """\
1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
2 1 0:5 / /mnt/my\\040share rw shared:2 master:1 - nfs4 host:/ rw
3 2 0:6 / /mnt/my\\040share/local rw - xfs /dev/sdb rw
4 1 0:7 / /mnt/host rw - virtiofs host rw
5 1 8:1 /data/night.bulkwf /data/night.bulkwf rw - ext4 /dev/sda1 rw
6 1 0:8 / /home/a rw - fuse.fuse-overlayfs fuse-overlayfs rw
7 1 0:9 / /over rw - nfs host:/ rw
8 7 0:9 / /over rw - btrfs /dev/sdc rw
"""


@pytest.fixture
def path(folder):
    return folder / "run.bulkwf"


def lies_on(monkeypatch, folder, kind):
    """Let the system say that *folder* is on a file system of this kind."""
    mounts = folder / "mountinfo"
    mounts.write_text(f"1 0 8:1 / {folder} rw - {kind} source rw\n")
    monkeypatch.setattr(place, "MOUNTS", mounts)


# --- file systems -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home", "ext4"),
        ("/mnt/my share/a", "nfs4"),
        ("/mnt/my share/local/b", "xfs"),
        ("/mnt/host", "virtiofs"),
        ("/home/a/b", "fuse.fuse-overlayfs"),
        ("/home/ab", "ext4"),
        ("/over/x", "btrfs"),
    ],
)
def test_the_file_system_of_a_folder_is_that_of_the_deepest_and_last_mount(folder, kind):
    assert filesystem_of(MOUNTS, Path(folder)) == kind


@given(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1).filter(lambda name: name != "."))
def test_a_mount_point_of_any_name_is_found(name):
    # As the kernel writes it (`mangle` in fs/seq_file.c).
    written = "".join(f"\\{ord(one):03o}" if one in " \t\n\\#" else one for one in name)
    text = f"1 0 8:1 / / rw - ext4 a rw\n2 1 0:5 / /mnt/{written} rw - nfs4 host:/ rw\n"
    assert filesystem_of(text, Path("/mnt") / name / "below") == "nfs4"
    assert is_mount_point(text, Path("/mnt") / name)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("ext4", "local"),
        ("overlay", "local"),
        ("tmpfs", "local"),
        ("", "local"),
        ("9p", "network"),
        ("fuse.sshfs", "network"),
        ("ocfs2", "network"),
        ("virtiofs", "pass-through"),
        ("fuse.grpcfuse", "pass-through"),
        ("fuse.fuse-overlayfs", "unknown"),
        ("fuseblk", "unknown"),
        ("newfs", "unknown"),
    ],
)
def test_a_file_system_is_local_network_pass_through_or_unknown(kind, found):
    assert filesystem_class(kind) == found


def test_no_file_system_is_in_two_classes():
    assert len(CLASSES) == sum(len(kinds.split()) for kinds in KINDS.values())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        *(
            (kind, f"a network file system \\({kind}\\)")
            for kind in ("nfs4", "cifs", "fuse.sshfs", "9p", "gpfs", "gfs2")
        ),
        *((kind, f"passed through from another system \\({kind}\\)") for kind in ("virtiofs", "fakeowner", "vboxsf")),
    ],
)
def test_a_file_system_that_others_can_reach_is_refused_with_the_reason(folder, monkeypatch, kind, why):
    lies_on(monkeypatch, folder, kind)
    (folder / "here").mkdir()
    with pytest.raises(CheckpointError, match=f"{why}.*Name a place on a local disk with -c"):
        start(folder / "here" / "run.bulkwf")
    assert list((folder / "here").iterdir()) == []


@pytest.mark.parametrize("kind", ["fuse.fuse-overlayfs", "fuseblk", "newfs"])
def test_an_unknown_file_system_is_used_with_one_warning(path, monkeypatch, caplog, kind):
    lies_on(monkeypatch, path.parent, kind)
    asyncio.run(fill(path))
    assert len(list(read_results(path))) == 30
    [warning] = caplog.messages
    assert f"a file system that bulkwf does not know ({kind})" in warning


def test_a_local_file_system_is_used_without_a_warning(path, monkeypatch, caplog):
    lies_on(monkeypatch, path.parent, "btrfs")
    asyncio.run(fill(path))
    assert caplog.messages == []


def test_without_a_list_of_mounts_every_place_counts_as_local(monkeypatch, path, caplog):
    monkeypatch.setattr(place, "MOUNTS", path.with_name("there is no such file"))
    asyncio.run(fill(path))
    assert caplog.messages == []


def test_a_checkpoint_uses_fullfsync(path):
    checkpoint = start(path)
    pragmas = ("fullfsync", "checkpoint_fullfsync", "synchronous")
    found = [checkpoint._connection.db.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]
    asyncio.run(checkpoint.aclose())
    assert found == [1, 1, 2]


def test_where_sqlite_can_keep_no_log_no_file_is_left(path, monkeypatch):
    def connect(name):  # a file system without shared memory
        return sqlite3.connect(f"{Path(name).as_uri()}?vfs=unix-none", uri=True, isolation_level=None)

    monkeypatch.setattr(file, "connect", connect)
    with pytest.raises(CheckpointError, match="SQLite can't keep its write-ahead log there"):
        start(path)
    assert list(path.parent.iterdir()) == []


# --- one file, one name -------------------------------------------------------------------------------------------


def test_a_file_with_two_hard_links_is_refused_until_one_is_deleted(path):
    asyncio.run(fill(path))
    other = path.with_name("link.bulkwf")
    os.link(path, other)
    for name in (path, other):
        with pytest.raises(CheckpointError, match="has 2 names"):
            start(name)
    assert sorted(one.name for one in path.parent.iterdir()) == sorted([path.name, other.name])
    other.unlink()
    asyncio.run(start(path).aclose())


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_a_path_that_is_no_regular_file_is_refused_and_not_changed(path, make):
    make(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        start(path)
    assert not path.is_file()


def test_a_hard_link_made_during_a_run_is_refused_by_the_next_run(path):
    checkpoint = start(path)
    os.link(path, path.with_name("link"))
    asyncio.run(checkpoint.aclose())
    with pytest.raises(CheckpointError, match="has 2 names"):
        start(path)


def test_a_file_that_is_a_mount_point_is_found_in_the_mounts():
    assert is_mount_point(MOUNTS, Path("/data/night.bulkwf"))
    assert not is_mount_point(MOUNTS, Path("/data/other.bulkwf"))
    assert not is_mount_point("", Path("/data/night.bulkwf"))


def in_own_mounts(script):
    """Words before a command: shell that runs it (`"$@"`) with mounts of its own, which end with it."""
    return ["unshare", "--mount", "sh", "-ec", script, "-"]


def test_a_file_that_is_mounted_by_itself_is_refused_and_its_folder_is_not(folder):
    rows = write_rows("rows.jsonl", 30)
    Path("inside").mkdir()
    Path("inside/night").touch()
    Path("other").mkdir()
    alone = in_own_mounts('mount --bind night inside/night; "$@"')
    with emulator() as service:
        run = ("run", rows, *service.flags(), "-c")
        assert bulkwf(*run, "night").code == 0
        if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
            pytest.skip("NOT TESTED: only root may mount a file by itself")
        refused = bulkwf(*run, "inside/night", prefix=alone)
        assert refused.code == 4
        assert "only the file is mounted, not its folder" in refused.err
        assert "Mount the folder that holds it instead." in refused.err
        assert bulkwf(*run, "other/night", prefix=in_own_mounts('mount --bind . other; "$@"')).code == 0
        assert service.created == Counter(ids(30))


# --- SQLite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, "run.bulkwf"])
def test_an_old_sqlite_is_refused_naming_both_versions(folder, monkeypatch, target):
    monkeypatch.setattr(file.sqlite3, "sqlite_version_info", (3, 30, 1))
    with pytest.raises(CheckpointError, match=r"SQLite is 3\.30\.1, and checkpoints need 3\.31\.0 or newer"):
        start(None if target is None else folder / target)
    assert [one for one in folder.iterdir() if not one.name.endswith(".lock")] == []


NEWER = re.compile(
    r"\bRETURNING\b|\bON CONFLICT\s+DO\b|\)\s*STRICT\b|->>|\bMATERIALIZED\b|\bDROP COLUMN\b|\bUNIXEPOCH\b",
    re.IGNORECASE,
)
"""What SQLite has learnt since 3.31."""


def texts(source):
    """Every text in a file of Python but docstrings."""
    tree = ast.parse(source.read_text("utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_no_sql_needs_a_newer_sqlite_than_the_oldest_allowed():
    found = [text for source in Path(package.__file__).parent.rglob("*.py") for text in texts(source)]
    assert any("INSERT OR IGNORE INTO instance" in text for text in found)
    assert [text for text in found if NEWER.search(text)] == []
