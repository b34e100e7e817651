"""What tests of the teacher cache read, written once for each of their files."""

import pytest

from tests.signals.tiny_cache import KINDS, writer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A cache of everything, for each kind of record."""
    root = tmp_path_factory.mktemp("caches")
    for kind, records in KINDS.items():
        writer(root / kind, records()).write()
    return root
