"""Cases are found by their files, so that other folders of the same layout are checked by naming them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import COMMITTED, NUMBERS, VARIABLE, cases, family, found, roots
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ALWAYS = {
    "algorithms",
    "flow_sde",
    "gr00t",
    "openvla_ar",
    "openvla_oft_discrete",
    "openvla_tokenization",
    "pi0",
    "pi05",
    "pi_preprocess",
}
KNOWN = ALWAYS | {"openvla_oft_l1", "openvla_oft_preprocess"}


def test_a_clone_has_a_small_case_of_every_family():
    assert {kind for kind in found() for case in cases(kind) if case.id.startswith("committed/")} == ALWAYS
    assert sum(file.stat().st_size for file in COMMITTED.rglob("*") if file.is_file()) < 10_000_000


def test_no_folder_with_numbers_is_overlooked():
    assert found().keys() <= KNOWN
    for root in roots().values():
        for file in root.rglob("*"):
            assert file.suffix not in NUMBERS or family(file.parent), f"{file} belongs to no case"


def run(folder, *arguments):
    """pytest with `folder` as the named one."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *arguments]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        command,
        cwd=HERE.parents[1],
        env=variables | {VARIABLE: str(folder)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def copy_of_committed(to):
    """Every committed case under another name, at another depth. Returns how many there are."""
    committed = [case.values[0] for kind in found() for case in cases(kind) if case.id.startswith("committed/")]
    for number, folder in enumerate(committed):
        place = to / "some folder" / f"number-{number}" / "case"
        place.mkdir(parents=True)
        for file in folder.iterdir():
            if file.is_file() and file.suffix != ".md":
                shutil.copyfile(file, place / file.name)
    return len(committed)


def test_cases_are_found_whatever_they_are_called(tmp_path, monkeypatch):
    copy_of_committed(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for kind, known in found.__wrapped__().items():
        words = [name.split("/")[0] for name in known]
        assert words.count("named") == words.count("committed"), kind


def test_a_named_folder_without_a_case_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no parity case below"):
        found.__wrapped__()


@pytest.mark.slow
def test_cases_elsewhere_are_run_and_a_wrong_number_in_one_fails(tmp_path):
    count = copy_of_committed(tmp_path)
    tests = sorted(str(file) for file in HERE.glob("test_*.py") if file != Path(__file__))
    right = run(tmp_path, "-vv", "-k", "named or number", *tests)
    assert right.returncode == 0, right.stdout
    prompts = [name for name in found()["openvla_tokenization"] if name.startswith("committed/")]  # all are in one test
    assert len(set(re.findall(r"number-(\d+)", right.stdout))) == count - len(prompts)
    for file in tmp_path.rglob("expected.safetensors"):
        whole, name = file.read_bytes(), file.parents[1].name
        numbers = load_file(file)
        for key in [
            key for key in numbers if key in ("v_ts", "prefix_embs", "value", "action_logits", "greedy_actions")
        ]:
            wrong = numbers[key].clone()
            wrong.view(-1)[0] += 1e-2  # the last ones may be padding
            save_file({**numbers, key: wrong}, file)
            result = run(tmp_path, "-k", name, *tests)
            assert result.returncode == 1, (file, key, result.stdout)
        file.write_bytes(whole)
