"""Recurrent layers: `nn.LSTM`, `nn.GRU`, `nn.RNN` and their subclasses, all of their layers and directions as one."""

from __future__ import annotations

from dropsurgery.matching import Layer, Pattern, ops

PATTERN = Pattern("rnn", forms=[ops(rnn="rnn")], edges={"module": Layer("rnn")})
