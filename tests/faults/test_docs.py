"""docs/faults.md names a test for every fault, and each is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_fault_has_a_test():
    text = (ROOT / "docs" / "faults.md").read_text("utf-8")
    cells = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    tests = [row[3] for row in cells if len(row) == 5 and "fault" not in row[1]]
    assert len(tests) > 10
    for cell in tests:
        paths = re.findall(r"`(.+?)`", cell.replace("`F/", "`tests/faults/"))
        assert paths or "see below" in cell, cell
        for path in paths:
            assert (ROOT / path).is_file(), path
