"""Refuses places where a checkpoint is not safe: some file systems, and a file that has more than one name.

All processes that open the file must share the locks and the memory of SQLite's log. The log's name is derived from the
file's name, so a file that has two names, or is mounted without its folder, can get two logs.
"""

import logging
import os
import re
import stat
from pathlib import Path

from bulkwf.errors import CheckpointError

__all__ = ["filesystem_class", "filesystem_of", "is_mount_point", "refuse_place"]

log = logging.getLogger("bulkwf")

MOUNTS = Path("/proc/self/mountinfo")
KINDS: dict[str, str] = {
    # Mounted by one kernel only.
    "local": """
        apfs aufs bcachefs btrfs exfat ext2 ext3 ext4 f2fs hfs hfsplus jfs msdos nilfs2 ntfs ntfs3 overlay ramfs
        reiserfs rootfs shiftfs tmpfs ubifs udf ufs vfat xfs zfs
    """,
    # Other machines may have them mounted at the same time.
    "network": """
        9p acfs afs beegfs ceph cifs coda cvfs davfs fhgfs gfs gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 orangefs
        panfs pvfs2 smb2 smb3 smbfs wekafs
        fuse.afp fuse.alluxio-fuse fuse.blobfuse fuse.blobfuse2 fuse.ceph fuse.ceph-fuse fuse.curlftpfs fuse.davfs
        fuse.fuse_dfs fuse.gcsfuse fuse.glusterfs fuse.goofys fuse.gvfsd-fuse fuse.juicefs fuse.mfs fuse.mountpoint-s3
        fuse.quobyte fuse.rclone fuse.s3fs fuse.seaweedfs fuse.smbnetfs fuse.sshfs
    """,
    # The files of another kernel: those of a virtual machine's host.
    "pass-through": """
        drvfs fakeowner prl_fs vboxsf virtiofs vmhgfs
        fuse.grpcfuse fuse.osxfs fuse.prl_fsd fuse.virtiofs fuse.vmhgfs-fuse
    """,
}
"""Types of file systems, as the kernel calls them, by class."""
CLASSES = {kind: found for found, kinds in KINDS.items() for kind in kinds.split()}
WHY = {
    "network": "a network file system ({kind}): other machines can open the file, and SQLite's locks and shared memory "
    "end at this one",
    "pass-through": "passed through from another system ({kind}): programs there can open the file, and SQLite's locks "
    "and shared memory end at this one",
}


def refuse_place(path: Path) -> None:
    """Refuse a place where a checkpoint is not safe; warn if nothing is known about it.

    Args:
        path: The checkpoint, without symbolic links. It need not exist.

    Raises:
        CheckpointError: A network or pass-through file system, a file that is mounted without its folder, a file with
            several hard links, or no regular file.
    """
    mounts = _read_mounts()
    kind = filesystem_of(mounts, path.parent)
    found = filesystem_class(kind)
    if found in WHY:
        raise CheckpointError(
            f"{path}: the folder is on {WHY[found].format(kind=kind)}. A row could be started twice. "
            "Name a place on a local disk with -c."
        )
    if found == "unknown":
        log.warning(
            "%s: the folder is on a file system that bulkwf does not know (%s). If other machines can reach the "
            "folder, rows may start twice: stop, and name a place on a local disk with -c. Otherwise go on",
            path,
            kind,
        )
    if is_mount_point(mounts, path):
        raise CheckpointError(
            f"{path}: only the file is mounted, not its folder, so its log ({path.name}-wal) would stay behind when "
            "the file is mounted elsewhere. Mount the folder that holds it instead."
        )
    _refuse_file(path)


def _refuse_file(path: Path) -> None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: this is not a regular file. Name another one with -c.")
    if found.st_nlink > 1:
        raise CheckpointError(
            f"{path}: the file has {found.st_nlink} names (hard links), and its log ({path.name}-wal) belongs to one "
            "of them. Keep the name that the run used and delete the others; for a second checkpoint, copy the file."
        )


def filesystem_class(kind: str) -> str:
    """`local`, `network`, `pass-through` or `unknown`; `local` if the system does not say the type."""
    return CLASSES.get(kind, "unknown") if kind else "local"


def filesystem_of(mounts: str, folder: Path) -> str:
    """Type of the file system of *folder*, from the text of `mountinfo`; empty if the text does not say."""
    deepest, kind = -1, ""
    for point, mounted in _parse(mounts):
        if (folder == point or point in folder.parents) and len(point.parts) >= deepest:
            deepest, kind = len(point.parts), mounted
    return kind


def is_mount_point(mounts: str, path: Path) -> bool:
    """Whether something is mounted at *path* itself, by the text of `mountinfo`."""
    return any(point == path for point, _ in _parse(mounts))


def _parse(mounts: str) -> list[tuple[Path, str]]:
    """Mount point and type of each line. A later line covers an earlier one at the same point."""
    # "36 35 98:0 /root /mnt/point rw,noatime master:1 - ext4 /dev/root rw"
    lines = (line.split(" ") for line in mounts.split("\n") if " - " in line)
    return [(Path(_unescape(fields[4])), fields[fields.index("-", 6) + 1]) for fields in lines]


def _unescape(text: str) -> str:
    """Undo the kernel's escapes: a blank, line end, backslash or `#` is a backslash and three octal digits."""
    encoded = re.sub(rb"\\([0-3][0-7]{2})", lambda escaped: bytes([int(escaped[1], 8)]), os.fsencode(text))
    return os.fsdecode(encoded)


def _read_mounts() -> str:
    try:
        return os.fsdecode(MOUNTS.read_bytes())
    except OSError:
        return ""
