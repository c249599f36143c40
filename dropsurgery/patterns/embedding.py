"""Embeddings: a row of a matrix for each number, `nn.Embedding` or `F.embedding`."""

from __future__ import annotations

from dropsurgery.matching import After, Layer, Pattern, ops

PATTERN = Pattern(
    "embedding",
    forms=[ops(embedding="embedding")],
    edges={"output": After("embedding"), "module": Layer("embedding")},
)
