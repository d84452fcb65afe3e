"""One running simulator for all tests of a module, and what makes the helpers here importable."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from matrix_simulators import PLACES, Recorder


@pytest.fixture(scope="module", params=[pytest.param(place, marks=place.marks, id=place.name) for place in PLACES])
def simulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    """Every simulator of the matrix in turn, with cameras."""
    if reason := request.param.absent():
        pytest.skip(reason)
    with request.param.start(tmp_path_factory.mktemp(request.param.name)) as started:
        yield Recorder(request.param, started)
