"""Two thousand cycles in one process: what it occupies stays what it was.

Not part of `make test`; `make test-long` runs it and shows the figures.
"""

import json
import time

import numpy as np
import pytest

from tests.faults.processes import finish

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("compiled_programs")]

CYCLES = 2000
WARM = 100  # cycles after which everything has been compiled
RARELY, ALWAYS = 20, 1  # cycles from checkpoint to checkpoint


@pytest.fixture(scope="module", params=[RARELY, ALWAYS], ids=lambda n: f"every-{n}")
def every(request):
    """Every so many cycles there is a checkpoint."""
    return request.param


@pytest.fixture(scope="module")
def gauges(every, start, tmp_path_factory):
    """Name -> values, every ten cycles of rollout, update and perhaps checkpoint."""
    folder = tmp_path_factory.mktemp("soak") / "run"
    began = time.monotonic()
    process = start(folder, str(CYCLES), str(every), module="long_run")
    status, errors = finish(process, timeout=1500)
    assert status == 0, errors
    seconds = time.monotonic() - began
    print(f"\n{CYCLES} cycles, {CYCLES // every} checkpoints: {seconds:.0f} s")
    lines = (folder / "gauges.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == list(range(0, CYCLES, 10))
    checkpoints = {path.name for path in (folder / "checkpoints").glob("[!.]*")}
    assert checkpoints == {str(CYCLES - every), str(CYCLES)}
    return {name: np.array([e[name] for e in entries]) for name in entries[0]}


def quarters(values):
    """Its mean in each quarter of the run."""
    return [float(part.mean()) for part in np.split(values, 4)]


def test_memory_is_flat(gauges, every):
    means = quarters(gauges["memory"])
    growth = means[3] - means[1]  # in half of all cycles
    print("memory by quarter, MiB:", [round(mean / 2**20, 1) for mean in means])
    print(f"{growth / means[1]:+.2%}, {growth / (CYCLES / 2):.0f} bytes a cycle")
    assert abs(growth) < 0.03 * means[1]
    # Of a larger process three percent are more.
    assert growth / (CYCLES / 2 / every) < (20 if every == ALWAYS else 200) * 2**10


@pytest.mark.parametrize("name", ["handles", "threads", "arrays"])
def test_nothing_is_left_open_or_alive(gauges, name):
    """A checkpoint is being written or is not, by chance: that is four handles more."""
    means = quarters(gauges[name])
    print(f"{name} by quarter:", [round(mean, 1) for mean in means])
    assert means[3] <= means[1] + 4  # one left open in 100 cycles would be ten


def test_nothing_is_compiled_again(gauges):
    compiled = gauges["compiled"]
    print("compiled:", compiled[0], compiled[WARM // 10], compiled[-1])
    assert compiled[WARM // 10] > 0
    assert compiled[-1] == compiled[WARM // 10]
