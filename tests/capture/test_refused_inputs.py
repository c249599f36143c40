"""An example input that the model refuses: one error, in the model's own words, and nothing printed besides."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from dropsurgery import CaptureError, find_sites


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def test_one_error_and_no_log() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(handler)
    try:
        with pytest.raises(CaptureError, match=r"\(float32\[2, 5\]\): RuntimeError\('.*cannot be multiplied") as caught:
            find_sites(Classifier(), example_inputs=torch.empty(2, 5))
    finally:
        log.removeHandler(handler)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not records
    assert not log.disabled


def test_the_part_that_raises_is_named() -> None:
    with pytest.raises(CaptureError, match=r"\(float32\[2, 5\]\), in '1': RuntimeError"):
        find_sites(nn.Sequential(nn.ReLU(), Classifier()), example_inputs=torch.empty(2, 5))
