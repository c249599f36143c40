"""Each worker computes on one thread: there are as many workers as cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
