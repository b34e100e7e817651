"""An experiment in miniature: resumable, stopped by SIGTERM, and quick.

It records its arguments and counts to five, one count per file ``go-N`` it is given.
"""

import json
import signal
import sys
import time
from pathlib import Path

FOLDER = Path("runs/toy")
STEPS = 5


def _stop(signum, frame):
    print("stopped")
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "argv").open("a") as log:
        log.write(json.dumps(sys.argv[1:]) + "\n")
    if "--fail" in sys.argv:
        sys.exit(3)
    done = FOLDER / "done"
    first = int(done.read_text()) if done.exists() else 0
    for step in range(first + 1, STEPS + 1):
        while not Path(f"../go-{step}").exists():
            time.sleep(0.02)
        partial = FOLDER / "partial"
        partial.write_text(str(step))
        partial.rename(done)
        print("step", step)
