"""Compression: cut what structural dropout masks out of the weights, into a smaller model of ordinary modules.

    masked:  Q(act(norm(P x)) · [i < c] · U / c)      sliced:  Q[:, :c] · U / c, norm[:c], P[:c]

A cut begins at a site and spreads to every tensor that has to be cut with it (`spreading`), by the rules of each
operation (`rules`, `relations`). Then zeros and factors are followed (`states`): what a layer reads may be cut out of
it where it is zero. What the weights lose is worked out (`picks`) and done on a copy (`carrying`), with the sizes that
forwards read (`literals`); at last both models are run (`checking`).

The dependency graph of torch-pruning 1.6.1 was tried in place of the first step. It finds which channels are coupled,
and cuts a gap or a double convolution right. But it cuts wherever channels are coupled, asks nowhere whether what is
cut is zero there, and refuses nothing: against the masked model the outputs differed by 5 % behind a residual sum, 2 %
in front of a depthwise convolution with a norm, 44 % in front of a layer norm and 61 % in front of a grouped
convolution; heads are no unit of it (of a ViT's 3 x 3 x 64 rows of `qkv` the first 192 are the queries of all heads),
and it knows no factor U / c. What it would take over is the smaller part, so nothing depends on it.
"""

from __future__ import annotations

from dropsurgery.compression.compressing import compress

__all__ = ["compress"]
