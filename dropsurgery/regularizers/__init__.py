"""The regularizers, one method a file: the paper's function first, a thin Module after it.

A file here is a regularizer by its name alone (`dropsurgery.catalogue`); files that begin with an underscore
are shared machinery.
"""

from dropsurgery.regularizers._base import Rate, Regularizer

__all__ = ["Rate", "Regularizer"]
