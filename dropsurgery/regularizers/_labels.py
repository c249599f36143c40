"""Labels of batches, checked; and what features come to on average in each class, over any number of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError


def check_labels(labels: object, what: str, readable: bool = True) -> Tensor:
    """Return `labels`; a SurgeryError unless they are a tensor (B,) of integers, from 0 where they are `readable`.

    Labels on an accelerator are waited for to be read.
    """
    numbers = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not isinstance(labels, Tensor) or not numbers or labels.dtype == torch.bool or labels.dim() != 1:
        raise SurgeryError(
            f"{what}: expected a tensor (B,) of integers, the class of each sample, got {_shown(labels)}"
        )
    if readable and labels.numel() and (least := int(labels.min())) < 0:
        raise SurgeryError(
            f"{what}: expected classes counted from 0, got {least}; leave samples without a class out of the batch"
        )
    return labels


def pairs(validation: object) -> Iterator[tuple[Any, Tensor]]:
    """Give the pairs (inputs, labels) of a validation, which is one such pair or gives them batch by batch.

    A SurgeryError where it is neither, where labels are no such tensors, or where there is no sample at all.
    """
    samples = 0
    batches: Iterable[Any] = [validation] if _is_pair(validation) else _batches(validation)
    for pair in batches:
        if not _is_pair(pair):
            raise SurgeryError(_expected(f"a batch that is {_shown(pair)}"))
        inputs, labels = pair
        check_labels(labels, "validation: labels")
        samples += len(labels)
        if len(labels):
            yield inputs, labels
    if not samples:
        raise SurgeryError("validation: expected at least one sample, got none; is the loader used up?")


def _is_pair(thing: object) -> bool:
    return isinstance(thing, tuple | list) and len(thing) == 2 and isinstance(thing[1], Tensor)


def _batches(validation: object) -> Iterator[Any]:
    if isinstance(validation, Tensor | dict | str) or not isinstance(validation, Iterable):
        raise SurgeryError(_expected(_shown(validation)))
    return iter(validation)


def _expected(got: str) -> str:
    return (
        f"validation: expected a pair (inputs for the model, labels), or batches of such pairs as a loader gives them, "
        f"got {got}; labels are to be a tensor"
    )


def _shown(thing: object) -> str:
    if isinstance(thing, Tensor):
        return f"one of {thing.dtype} and shape {tuple(thing.shape)}"
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {', '.join(type(each).__name__ for each in thing[:4]) or 'nothing'}"
    return type(thing).__name__


class LabelUser(Protocol):
    """What a regularizer has that `needs_labels`."""

    reading: ClassSums | None
    p: Tensor

    @property
    def where(self) -> str:
        """What it is called in errors."""

    @property
    def classes(self) -> int:
        """How many there are; 0 before the first validation."""

    def require_known(self, labels: Tensor, seen: Tensor | None = None) -> None:
        """A SurgeryError where `labels` have a class that the validation (by default the last one) has not."""

    def remember(self, means: Tensor, seen: Tensor) -> None:
        """Take the means of a validation, (K, D), and which classes it had, (K,) on the CPU."""


class ClassSums:
    """Sums of features and numbers of samples by class, of all batches that were added.

    Attributes:
        where: what is said of it in errors.
        labels: those of the batch whose features are to come next.
    """

    labels: Tensor | None = None

    def __init__(self, where: str, classes: int = 0) -> None:
        self.where = where
        self._most = classes  # how many are known, 0 for none
        self._sums: Tensor | None = None
        self._counts = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._dtype = torch.float32

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features (n, D), and labels (n,) that `check_labels` let pass."""
        if len(features) != len(labels):
            raise SurgeryError(
                f"{self.where}: expected a label for each of {len(features)} samples of the validation, "
                f"got {len(labels)}"
            )
        if features.is_meta or labels.is_meta:
            raise SurgeryError(
                f"{self.where}: expected a validation of a model with weights, got one on the meta device"
            )
        host = labels.to("cpu", torch.int64)
        self._grow(features, int(host.max()) + 1)
        assert self._sums is not None
        # Sums so exact that the means do not hang on how samples are put into batches; some devices have no float64.
        index, wide = host.to(features.device), features.detach().to(self._sums.dtype)
        self._sums.index_add_(0, index, wide)
        self._counts += torch.bincount(host, minlength=len(self._counts))

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the means (K, D), in float32 or wider, and which classes were seen, (K,) on the CPU."""
        if self._sums is None:
            raise SurgeryError(
                f"{self.where}: the validation's forward, in eval mode, does not come by here; leave this site out "
                "(`where: {exclude: …}`)"
            )
        counts = self._counts.clamp(min=1).to(self._sums)
        return (self._sums / counts[:, None]).to(self._dtype), self._counts > 0

    def _grow(self, features: Tensor, classes: int) -> None:
        """Have a row for each class, of as many numbers as the features are."""
        if self._most and classes > self._most:
            raise SurgeryError(
                f"{self.where}: expected classes below {self._most}, as many as the first validation had, "
                f"got class {classes - 1}"
            )
        size, rows = features.shape[1], max(self._most, classes, len(self._counts))
        if self._sums is None:
            self._dtype = torch.promote_types(features.dtype, torch.float32)
            sums = torch.float32 if features.device.type == "mps" else torch.float64
            self._sums = torch.zeros(0, size, dtype=sums, device=features.device)
        if self._sums.shape[1] != size:
            raise SurgeryError(
                f"{self.where}: expected {self._sums.shape[1]} units, as in the validation's first batch, got {size}"
            )
        if rows > len(self._counts):
            more = rows - len(self._counts)
            self._sums = torch.cat([self._sums, self._sums.new_zeros(more, size)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more)])
