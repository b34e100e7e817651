"""Stands in for what a host of a slice has and this machine has not, or must not use.

Called by the names of the programs: ``curl`` is the metadata server; ``apt-get``
installs ``exportfs`` and ``mount.nfs4``; a mount is a link to the folder that worker 0
exports, if it does so to this worker. What only root may do is refused without
``sudo``, and written down with it.
"""

import json
import os
import sys
import time
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
HOME = Path(os.environ["HOME"])
WORKER = int(os.environ["FAKE_WORKER"])
ADDRESSES = [f"10.0.0.{n + 2}" for n in range(int(os.environ["FAKE_HOSTS"]))]
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def curl(*words: str) -> int:
    attributes = {
        METADATA + "agent-worker-number": str(WORKER),
        METADATA + "worker-network-endpoints": ",".join(
            os.environ["FAKE_ENDPOINT"].format(address) for address in ADDRESSES
        ),
    }
    if "Metadata-Flavor: Google" not in words or words[-1] not in attributes:
        print("curl: (22) The requested URL returned error: 404", file=sys.stderr)
        return 22
    print(attributes[words[-1]], end="")
    return 0


def install(name: str) -> None:
    program = HOME / "sbin" / name
    program.parent.mkdir(exist_ok=True)
    program.unlink(missing_ok=True)
    program.symlink_to(CLOUD / "bin" / "stand-in")


def apt_get(*words: str) -> int:
    busy = CLOUD / f"apt-is-busy-{WORKER}"
    if "update" in words and busy.exists():
        busy.unlink()
        print("E: Could not get lock /var/lib/apt/lists/lock", file=sys.stderr)
        return 100
    if "install" in words:
        assert not busy.exists()
        if "nfs-kernel-server" in words:
            install("exportfs")
        install("mount.nfs4")
    return 0


def exportfs(o: str, options: str, *exports: str) -> int:
    assert "fsid=0" in options.split(",")
    pairs = dict(export.split(":", 1) for export in exports)
    (CLOUD / "exports").write_text(json.dumps(pairs))
    return 0


def mount(*words: str) -> int:
    if (CLOUD / "firewall").exists():
        time.sleep(600)
    source, point = words[-2:]
    exports = CLOUD / "exports"
    folder = exports.exists() and json.loads(exports.read_text()).get(ADDRESSES[WORKER])
    if source != f"{ADDRESSES[0]}:/" or not folder or not (CLOUD / "nfs").exists():
        print("mount.nfs4: access denied by server", file=sys.stderr)
        return 32
    Path(point).rename(HOME / "what-it-hides")
    Path(point).symlink_to(folder)
    return 0


def systemctl(*words: str) -> int:
    if words == ("start", "nfs-server"):
        (CLOUD / "nfs").touch()
    return 0


def mountpoint(q: str, point: str) -> int:
    return 0 if Path(point).is_symlink() else 32


def sudo(*words: str) -> int:
    with (CLOUD / "as-root").open("a") as record:
        record.write(json.dumps([WORKER, *words]) + "\n")
    os.environ["FAKE_ROOT"] = "yes"
    os.execvp(words[0], words)


def main(program: str, *words: str) -> int:
    if program in ("sudo", "curl", "mountpoint"):
        return globals()[program](*words)
    if "FAKE_ROOT" not in os.environ:
        print(f"{program}: you have to be root", file=sys.stderr)
        return 1
    return globals()[program.replace("-", "_")](*words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
