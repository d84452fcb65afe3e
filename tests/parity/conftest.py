"""Makes `cases` and `openvla_case` importable for the tests here, and leaves out tests of what no folder has a case of;
`test_cases.py` says which families have one always."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not (item.path.parent == Path(__file__).parent and _has_no_case(item))]


def _has_no_case(item: pytest.Item) -> bool:
    return any(mark.kwargs.get("reason", "").startswith("got empty parameter") for mark in item.iter_markers("skip"))
