"""What a bad disk does to one file, or one machine's view of a disk to a folder."""

import errno
import os
import shutil
import time

from rkd_jax.training import checkpoint

VIEWS = {"FOLDERS_ARE_VIEWS": "yes"}
"""Environment of processes of which one has a `view`."""


SLOW_DISK = {"DISK_IS_SLOW": "yes"}
"""Environment of processes to which a checkpoint takes fifteen seconds."""

FULL_DISK = {"DISK_IS_FULL": "yes"}
"""Environment of processes of which the first cannot finish a checkpoint."""


def cut(path):
    """Half of it is left."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """One bit in the middle is another."""
    text = bytearray(path.read_bytes())
    text[len(text) // 2] ^= 1
    path.write_bytes(text)


def view(folder, path):
    """The folder's files once more below ``path``, as another machine sees them."""
    shutil.copytree(folder, path, copy_function=os.symlink)
    return path


def accept_views():
    """In such a process: what is new is not to be seen in a view, so nobody looks."""
    if VIEWS.items() <= os.environ.items():
        checkpoint.check_folder = lambda folder: None


def mind_the_disk(index):
    """In such a process, which is number ``index``, checksums are late or fail."""
    write = checkpoint.write_checksums

    def write_badly(folder):
        if SLOW_DISK.items() <= os.environ.items():
            time.sleep(15)
        if FULL_DISK.items() <= os.environ.items() and index == "0":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder)

    checkpoint.write_checksums = write_badly


def seen_here_alone(file):
    """The file of a `view`, which may be harmed without harm to the true one."""
    whole = file.resolve()
    file.unlink()
    shutil.copy(whole, file)
    return file
