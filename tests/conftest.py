"""Each worker computes on one thread: there are as many workers as cores. Dropped models are freed as the tests go."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

torch.set_num_threads(1)
_done = itertools.count(1)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    # Python collects cycles by the number of objects, and a model is few objects of many megabytes.
    if next(_done) % 20 == 0:
        gc.collect()
