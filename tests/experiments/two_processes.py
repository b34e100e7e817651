"""Two processes that make one run, as a user would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_two(
    module: str, *arguments: str, devices: int = 2
) -> list[tuple[int, str, str]]:
    """(exit status, output, errors) of two processes with some devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    # Of flags that the tests themselves have, the later one counts.
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={devices}"
    )
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", module, "--distributed", *arguments]
    both = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | shared | {"JAX_PROCESS_ID": index, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in ("0", "1")
    ]
    try:
        ends = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    return [(p.returncode, *end) for p, end in zip(both, ends, strict=True)]
