"""An experiment in miniature: resumable, stopped by SIGTERM, and quick.

It records its arguments and counts to five, one count per file ``go-N`` it is given. Of
several processes the first one counts, and the others wait until it has.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path("runs/toy")
STEPS = 5


def _stop(signum, frame):
    print("stopped")
    sys.exit(128 + signum)


def _follow(number: str) -> None:
    print("process", number, flush=True)
    done = FOLDER / "done"
    while not done.exists() or int(done.read_text()) < STEPS:
        time.sleep(0.02)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    FOLDER.mkdir(parents=True, exist_ok=True)
    number = os.environ["FAKE_WORKER"] if "--distributed" in sys.argv else "0"
    with (FOLDER / f"argv{number.strip('0')}").open("a") as log:
        log.write(json.dumps(sys.argv[1:]) + "\n")
    if "--hang" in sys.argv and number != "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("hangs", flush=True)
        time.sleep(600)
    if "--fail" in sys.argv:
        sys.exit(3)
    if number != "0":
        sys.exit(_follow(number))
    done = FOLDER / "done"
    first = int(done.read_text()) if done.exists() else 0
    for step in range(first + 1, STEPS + 1):
        while not Path(f"../go-{step}").exists():
            time.sleep(0.02)
        partial = FOLDER / "partial"
        partial.write_text(str(step))
        partial.rename(done)
        print("step", step)
