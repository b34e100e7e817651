"""What the files of a folder were when they were written, so that damage shows.

A storage that returns other bytes than it was given says nothing, and neither do the
compressed arrays inside a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rkd_jax.training.run import write_json

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write size and sha256 of every file in the folder's folders beside them.

    Files of the folder itself are left out: orbax still adds to them.
    """
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): _summary(path) for path in files}
    write_json(folder / CHECKSUMS, found)


def has_checksums(folder: Path) -> bool:
    """Whether `write_checksums` was there."""
    return (folder / CHECKSUMS).is_file()


def first_damage(folder: Path) -> str | None:
    """What is wrong with the first damaged file, or None.

    Files that were added later do not matter.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        written = json.loads((folder / CHECKSUMS).read_text("utf-8"))
        written = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in written.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{CHECKSUMS} is unreadable"
    for name, (size, digest) in written.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
        if _summary(path)["sha256"] != digest:
            return f"{name} is not what was written"
    return None


def _summary(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
