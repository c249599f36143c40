"""One step of a recurrent layer: `nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`, all of whose calls are one layer."""

from __future__ import annotations

from dropsurgery.matching import Layer, Pattern, ops

PATTERN = Pattern("rnn_cell", forms=[ops(cell="rnn_cell")], edges={"module": Layer("cell")})
