"""Stands in for Google Cloud: ``gcloud`` of the tests, the one thing not real there.

It records every call, answers ``describe`` from a list of states, and keeps a TPU VM
and its buckets as folders: what it is asked to execute there, a real shell executes, on
all workers of a slice at the same time.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
HOSTS = int(os.environ.get("FAKE_HOSTS", "1"))


def home(worker: int) -> Path:
    """The home folder on one of the hosts."""
    return CLOUD / (f"vm-{worker}" if worker else "vm")


def chosen(options: dict[str, str]) -> list[int]:
    """The workers that are meant."""
    which = options["--worker"]
    return list(range(HOSTS)) if which == "all" else [int(which)]


def local(url: str) -> Path:
    """Where the folder of the test keeps an object of a bucket."""
    return CLOUD / "buckets" / url.removeprefix("gs://")


def describe() -> int:
    """The next state of the list; the last one stays."""
    states = (CLOUD / "states").read_text().split()
    (CLOUD / "states").write_text("\n".join(states[1:] or states))
    if states[0] == "ABSENT":
        print("ERROR: NOT_FOUND: Resource 'x' was not found", file=sys.stderr)
    elif states[0] == "DENIED":
        print("ERROR: PERMISSION_DENIED: not yours", file=sys.stderr)
    else:
        print("WARNING: a newer gcloud is available", file=sys.stderr)
        print(states[0])
        return 0
    return 1


def execute(options: dict[str, str]) -> int:
    """One command on the hosts; the first status that is not 0, as gcloud does it."""
    command = ["bash", "-c", options["--command"]]
    processes = {}
    for worker in chosen(options):
        own = {"HOME": str(home(worker)), "FAKE_WORKER": str(worker)}
        if HOSTS > 1:  # what apt-get installs there
            own["PATH"] = f"{home(worker)}/sbin:{os.environ['PATH']}"
        processes[worker] = subprocess.Popen(
            command, cwd=home(worker), env=os.environ | own
        )
    ends = {worker: process.wait() for worker, process in processes.items()}
    for worker, status in ends.items():
        if status and len(ends) > 1:
            said = f"execution on worker {worker} failed with exit status {status}"
            print(f"##### Command {said}. Continuing.", file=sys.stderr)
    return next((status for status in ends.values() if status), 0)


def copy(source: str, target: str) -> int:
    """To or from a bucket."""
    while (CLOUD / "slow-bucket").exists():
        time.sleep(0.02)
    if not source.startswith("gs://"):
        local(target).parent.mkdir(parents=True, exist_ok=True)
        partial = local(target).with_suffix(".partial")
        shutil.copyfile(source, partial)
        partial.rename(local(target))  # as a bucket does: all of it, or nothing
    else:
        shutil.copyfile(local(source), target)
    return 0


def main(arguments: list[str]) -> int:
    with (CLOUD / "calls").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    words = [word for word in arguments if not word.startswith("--")]
    options = dict(
        w.split("=", 1) for w in arguments if w.startswith("--") and "=" in w
    )
    match words:
        case ["compute", "tpus", "queued-resources", "describe", _]:
            return describe()
        case ["compute", "tpus", "queued-resources", "create" | "delete", _]:
            return 0
        case ["compute", "tpus", "tpu-vm", "ssh", _]:
            return execute(options)
        case ["compute", "tpus", "tpu-vm", "scp", source, target]:
            for worker in chosen(options):
                shutil.copyfile(source, home(worker) / target.split(":", 1)[1])
            return 0
        case ["storage", "ls", url]:
            if local(url).exists():
                return 0
            print("ERROR: One or more URLs matched no objects.", file=sys.stderr)
            return 1
        case ["storage", "cp", source, target]:
            return copy(source, target)
    print(f"the tests know no gcloud {' '.join(words)}", file=sys.stderr)
    return 64


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
