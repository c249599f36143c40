"""The models here are large, and stand in cycles: what a test leaves is freed before the next one begins."""

from __future__ import annotations

import gc

import pytest


def pytest_runtest_teardown(item: pytest.Item) -> None:
    gc.collect()
