"""Published results are of a project, not of a machine."""

import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "docs/results"


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_results_name_no_folder_of_a_machine(path):
    assert re.findall(r'"(/[^"]*)"', path.read_text("utf-8")) == []
