"""A cloud in a folder, for the tests that call the scripts as a user does."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WHERE = {
    "RKD_TPU_PROJECT": "my-project",
    "RKD_TPU_ZONE": "us-west4-a",
    "RKD_TPU_NAME": "distil",
}
ON = "--project=my-project --zone=us-west4-a"
DESCRIBE = (
    f"gcloud compute tpus queued-resources describe distil {ON} "
    "'--format=value(state.state)'"
)
needs_linux = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "git", "flock", "setsid", "make"))),
    reason="a TPU VM has bash, git, flock, setsid and make; this machine does not",
)


def call(script: Path, *arguments: str, **environment: str):
    """The finished process of one script."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("RKD_")}
    return subprocess.run(
        ["bash", str(script), *arguments],
        env=own | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# The environment of the toy project: a python that has jax, and a pip that takes notes.
MAKEFILE = """
.venv/run.stamp:
\tmkdir -p .venv/bin
\tprintf '#!/bin/sh\\nexec $(PYTHON) "$$@"\\n' > .venv/bin/python
\tprintf '#!/bin/sh\\necho "$$@" >> .venv/installed\\n' > .venv/bin/pip
\tchmod +x .venv/bin/*
\ttouch $@
"""


class Cloud:
    """A small project in a git repository, and a cloud that is a folder.

    Args:
        accelerator: of so many ``hosts``; ``vm`` is the project on worker 0, ``vms``
            are those on all workers.
    """

    def __init__(self, folder: Path, accelerator: str = "v6e-1", hosts: int = 1):
        self.folder, self.project = folder, folder / "project"
        homes = [folder / (f"vm-{n}" if n else "vm") for n in range(hosts)]
        self.vms = [home / "rkd_jax" for home in homes]
        self.vm = self.vms[0]
        for home in homes:
            home.mkdir()
        shutil.copytree(ROOT / "tpu_scripts", self.project / "tpu_scripts")
        (self.project / "experiments").mkdir()
        (self.project / "experiments" / "__init__.py").touch()
        toy = (HERE / "toy_experiment.py").read_text()
        (self.project / "experiments" / "toy.py").write_text(toy)
        (self.project / "Makefile").write_text(MAKEFILE)
        (self.project / "note.txt").write_text("untracked")
        tools = folder / "bin"
        tools.mkdir()
        run = f'#!/bin/sh\nexec {sys.executable} -S {HERE / "fake_gcloud.py"} "$@"\n'
        (tools / "gcloud").write_text(run)
        (tools / "uv").write_text(f"#!/bin/sh\necho {sys.executable}\n")
        for tool in tools.iterdir():
            tool.chmod(0o755)
        self.environment = WHERE | {
            "RKD_TPU_TYPE": accelerator,
            "RKD_TPU_CAPACITY": "spot",
            "RKD_TPU_BUCKET": "gs://my-bucket",
            "RKD_TPU_POLL": "0.01",
            "RKD_TPU_SNAPSHOT_EVERY": "0.1",
            "FAKE_CLOUD": str(folder),
            "FAKE_HOSTS": str(hosts),
            "JAX_PLATFORMS": "cpu",
            "PATH": f"{tools}:{os.environ['PATH']}",
        }
        git = ["git", "-C", str(self.project)]
        subprocess.run([*git, "init", "--quiet"], check=True)
        tracked = ["tpu_scripts", "experiments", "Makefile"]
        subprocess.run([*git, "add", *tracked], check=True)

    def states(self, *names: str) -> None:
        """What the next looks at the queued resource find."""
        (self.folder / "states").write_text("\n".join(names))

    def __call__(self, script: str, *arguments: str, status: int = 0) -> str:
        """What one script prints, both streams."""
        script = self.project / "tpu_scripts" / script
        process = call(script, *arguments, **self.environment)
        text = process.stdout + process.stderr
        assert process.returncode == status, text
        return text

    def calls(self) -> list[str]:
        """The kinds of all calls since the last question, such as "tpu-vm ssh"."""
        record = self.folder / "calls"
        lines = record.read_text().splitlines() if record.exists() else []
        record.write_text("")
        kinds = [" ".join(json.loads(line)[2:4]) for line in lines]
        return [kind for kind in kinds if not kind.startswith(("gs:", "--", "/", "."))]

    def go(self, *steps: int) -> None:
        """Let the toy experiment take these steps."""
        for step in steps:
            (self.vm.parent / f"go-{step}").touch()

    def wait_for(self, path: Path, text: str = "") -> None:
        deadline = time.monotonic() + 20
        while not (path.exists() and text in path.read_text(errors="replace")):
            log = self.vm / "runs/.launch/log"
            said = log.read_text() if log.exists() else "nothing"
            assert time.monotonic() < deadline, f"no {text!r} in {path}; {said}"
            time.sleep(0.02)

    def runs(self, worker: int = 0) -> bool:
        """Whether anything of the launch is left there, its last snapshot included."""
        free = ["flock", "-n", str(self.vms[worker] / ".lock"), "true"]
        return subprocess.run(free, check=False).returncode != 0

    def wait_for_end(self) -> None:
        """Until nothing of the launch is left on any host."""
        deadline = time.monotonic() + 20
        while any(self.runs(n) for n, vm in enumerate(self.vms) if vm.exists()):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def job(self, worker: int = 0) -> Path:
        """Where command, pid, log and status of a worker are."""
        return self.vm / "runs/.launch" / (f"worker-{worker}" if worker else "")

    def arguments(self, worker: int = 0) -> list[list[str]]:
        """Of every start of the toy experiment."""
        lines = (self.vm / f"runs/toy/argv{worker or ''}").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def preempt(self) -> None:
        """The machine is gone, with all that ran and lay there."""
        for n, vm in enumerate(self.vms):
            pid = self.job(n) / "pid"
            if vm.exists() and pid.exists() and self.runs(n):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(pid.read_text()), signal.SIGKILL)
        self.wait_for_end()
        for vm in self.vms:
            shutil.rmtree(vm.parent)
            vm.parent.mkdir()


class Slice(Cloud):
    """A cloud whose TPU VM has several hosts."""

    def __init__(self, folder: Path, accelerator: str = "v5p-16", hosts: int = 2):
        super().__init__(folder, accelerator, hosts)
        self.environment["FAKE_ENDPOINT"] = "unknown:8470:{}"
        tool = folder / "bin" / "stand-in"
        run = f'exec {sys.executable} -S {HERE / "fake_host.py"} "${{0##*/}}" "$@"\n'
        tool.write_text(f"#!/bin/sh\n{run}")
        tool.chmod(0o755)
        for name in ("sudo", "curl", "mount", "mountpoint", "systemctl", "apt-get"):
            tool.with_name(name).symlink_to(tool)
        python = "exec $(PYTHON)"  # what it is asked for in words is written down
        note = f'[ "$$1" = -c ] && echo "$$2" > .venv/asked && exit; {python}'
        text = MAKEFILE.replace(python, note)
        (self.project / "Makefile").write_text(text)

    def as_root(self, worker: int) -> list[str]:
        """What a worker did as root since the last question."""
        record = self.folder / "as-root"
        calls = record.read_text().splitlines() if record.exists() else []
        calls = [json.loads(call) for call in calls]
        kept = [json.dumps(call) + "\n" for call in calls if call[0] != worker]
        record.write_text("".join(kept))
        return [" ".join(words) for number, *words in calls if number == worker]

    def wait_for_start(self, times: int = 1) -> None:
        """Until the toy experiment was begun so often on every worker."""
        for worker in range(len(self.vms)):
            self.wait_for(self.vm / f"runs/toy/argv{worker or ''}", "]")
            deadline = time.monotonic() + 20
            while len(self.arguments(worker)) < times:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def preempt(self) -> None:
        for name in ("exports", "nfs"):
            (self.folder / name).unlink(missing_ok=True)
        super().preempt()
