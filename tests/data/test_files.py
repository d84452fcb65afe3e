from pathlib import Path

import pytest

from embodied_rl.errors import UserError
from embodied_rl.files import write_atomic, write_together


def test_writes_text_and_bytes_into_new_folders(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.json", "ü")
    write_atomic(tmp_path / "a" / "c.bin", b"\x00")
    assert (tmp_path / "a" / "b.json").read_text() == "ü"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b.json", "c.bin"]


def test_nothing_changes_when_one_of_several_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("old")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*second"):
        write_together({tmp_path / "first": "new", tmp_path / "file" / "second": "new"})
    assert (tmp_path / "first").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "first"]
