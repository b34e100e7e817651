"""docs/faults.md names a test for every fault, and each is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_fault_has_a_test():
    text = (ROOT / "docs" / "faults.md").read_text("utf-8")
    table = text.split("\n\n")[2].splitlines()[2:]
    assert len(table) > 10
    for row in table:
        _, _, _, cell, _ = row.split("|")
        paths = re.findall(r"`(.+?)`", cell.replace("`F/", "`tests/faults/"))
        assert paths or "see below" in cell, cell
        for path in paths:
            assert (ROOT / path).is_file(), path
