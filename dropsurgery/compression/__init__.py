"""Compression: cut what structural dropout masks out of the weights, into a smaller model of ordinary modules.

    masked:  Q(act(norm(P x)) · [i < c] · U / c)      sliced:  Q[:, :c] · U / c, norm[:c], P[:c]

A cut begins at a site and spreads to every tensor that has to be cut with it (`spreading`), by the rules of each
operation (`rules`, `relations`). Then zeros and factors are followed (`states`): what a layer reads may be cut out of
it where it is zero. What the weights lose is worked out (`picks`) and done on a copy (`carrying`), with the sizes that
forwards read (`literals`); at last both models are run (`checking`).
"""

from __future__ import annotations

from dropsurgery.compression.compressing import compress

__all__ = ["compress"]
