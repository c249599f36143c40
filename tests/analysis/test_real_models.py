"""Every promise, on the smallest model of each family; by values on some; and the whole way as a process.

One week it is every other family, the next week the others; with DROPSURGERY_FAMILIES=all in the environment all are.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dropsurgery.analysis.certify import TRACES, UNBUILT, VALUES, certify
from dropsurgery.analysis.families import REPRESENTATIVES
from dropsurgery.analysis.sweep import read

BY_VALUES = ("test_resnet", "test_efficientnet", "test_convnext", "test_vit", "smp:Unet:resnet18")

WEEK = datetime.date.today().isocalendar().week
FAMILIES = REPRESENTATIVES if os.environ.get("DROPSURGERY_FAMILIES") == "all" else REPRESENTATIVES[WEEK % 2 :: 2]


@pytest.mark.parametrize("name", FAMILIES)
def test_by_traces(name: str) -> None:
    made = certify(name)
    assert made.sound and made.status != UNBUILT, (made.status, made.reason, made.broken)
    assert made.edits > 0


@pytest.mark.parametrize("name", BY_VALUES)
def test_by_values(name: str) -> None:
    made = certify(name, kind=VALUES)
    assert made.sound and made.compared == VALUES and not made.notes, (made.reason, made.broken, made.notes)


def test_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dropsurgery", "certify", "test_res*", "torchvision:squeezenet1_1", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    made = read(tmp_path / "certify.jsonl")
    names = sorted({each.model for each in made})
    assert len(names) > 1 and sorted(each.model for each in made if each.kind == TRACES) == names
    assert f"models                   {len(names)}" in done.stdout and "by traces" in done.stderr
    assert all(each.sound and each.versions["torch"] for each in made)
