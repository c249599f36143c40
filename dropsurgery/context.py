"""What the regularizers of one model share: the step, the seed, and random numbers keyed by both.

With a seed, the numbers of a draw depend on seed, site, step and how many forwards the site has had in this
step, and on nothing else: sites are independent of each other and of whatever else draws numbers. Without
one, it is torch's global generator, as for any layer. What all sites have to agree on in a forward, such as which
column of a net it goes through, comes from a key that they share; what holds for a batch, from one that stays the same
until the optimizer steps. The labels of the batch are here for those that go by them.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError

Entry = TypeVar("Entry")
Value = TypeVar("Value")
_CPU = torch.device("cpu")
_MARKS = 1 << 62
_KEPT = 1 << 17  # keys of forwards that may be run again; more than this only where no step ends
_handles = itertools.count()
_contexts: weakref.WeakValueDictionary[int, Context] = weakref.WeakValueDictionary()


class Context:
    """Step, seed and keyed random numbers of one model; without `seed`, all is torch's global generator's.

    Attributes:
        one_batch: tells whether the forwards from now to the next step are known to be of one batch; the clock sets it.
        labels: (B,), those of the batch that is being trained on, if they were told; no copy of the context has them.
    """

    one_batch: Callable[[], bool] = staticmethod(lambda: False)
    labels: Tensor | None = None

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise SurgeryError(f"seed: expected an int or None, got {seed!r}")
        self.seed = seed
        self._step = 0
        self._forwards: dict[str, int] = {}
        self._keys: dict[tuple[str, int], int] = {}
        self._shared: dict[tuple[str, int], int] = {}
        self._of_batch: dict[str, int] = {}
        self._labelled: dict[int, Tensor] = {}
        self._register()

    @property
    def step(self) -> int:
        """The step that the clock is at; to set it starts the count of forwards anew."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        if step != self._step or not self.one_batch():
            self._of_batch.clear()
        self._step = step
        self._forwards.clear()
        self._keys.clear()
        self._shared.clear()
        self._labelled.clear()

    @contextmanager
    def told(self, labels: Tensor | None) -> Iterator[None]:
        """Have these be the labels of the batch, within; None leaves those that there are."""
        outer = self.labels
        self.labels = outer if labels is None else labels
        try:
            yield
        finally:
            self.labels = outer

    def labels_of_forward(self) -> Tensor | None:
        """Return the labels of this forward's batch; one that checkpointing repeats meets those of its first time."""
        mark = int(torch.randint(_MARKS, (), device=_CPU))  # as in `_ask`
        if torch._C._current_graph_task_id() != -1:
            return self._labelled.get(mark, self.labels)
        if self.labels is not None:
            _remember(self._labelled, mark, self.labels)
        return self.labels

    def key(self, site_id: str) -> Tensor | None:
        """Return the key of the next draw at `site_id`, a 0-dim int64 CPU tensor; None without a seed."""
        return None if self.seed is None else self._ask(site_id, "", False)

    def shared_key(self, site_id: str, name: str) -> Tensor:
        """Return a key that all sites which ask for this `name` get alike in one forward, with and without a seed.

        The n-th forward of one site in a step is taken to be the n-th of every other one too.
        """
        return self._ask(site_id, name, False)

    def batch_key(self, site_id: str, name: str) -> Tensor:
        """Return a key that all sites which ask for this `name` get alike for one batch, with and without a seed.

        A batch is what one optimizer step learns from, in however many forwards its gradients are added up. As long as
        nothing says that steps are made at all (`one_batch`), each forward is one.
        """
        return self._ask(site_id, f"batch|{name}", True)

    def drawn_for_batch(self, name: str) -> Tensor | None:
        """Return the key of that `name` that this step's batch has got; None while no site has asked for it."""
        key = self._of_batch.get(f"batch|{name}")
        return None if key is None else torch.tensor(key, device=_CPU)

    @property
    def has_drawn_for_batch(self) -> bool:
        """Whether anything has been drawn that holds until the next step."""
        return bool(self._of_batch)

    def _ask(self, site_id: str, shared: str, of_batch: bool) -> Tensor:
        # Activation checkpointing runs a forward again inside backward, and must meet the same numbers. It
        # puts torch's global generator back to where it was, so that a number drawn from there tells which
        # forward is repeated; where it does not (preserve_rng_state=False), the last one is taken to be.
        # Drawn out here, it also keeps compilers from merging two calls of one site into one.
        mark = torch.randint(_MARKS, (), device=_CPU)
        key: Tensor = torch.ops.dropsurgery.key(self._handle, site_id, shared, of_batch, mark)
        return key

    def _next(self, site_id: str, shared: str, of_batch: bool, mark: int) -> int:
        repeated = torch._C._current_graph_task_id() != -1
        asker = f"{shared}|{site_id}" if shared else site_id
        if repeated and (asker, mark) in self._keys:
            return self._keys[asker, mark]
        index = max(0, self._forwards.get(asker, 0) - repeated)
        self._forwards[asker] = index + 1
        if of_batch and shared in self._of_batch and self.one_batch():
            key = self._of_batch[shared]
        else:
            key = self._made(site_id, shared, index, mark)
        if of_batch:
            self._of_batch[shared] = key
        return _remember(self._keys, (asker, mark), key)

    def _made(self, site_id: str, shared: str, index: int, mark: int) -> int:
        if self.seed is None:  # the first site of a forward decides, for all that come after it
            return _remember(self._shared, (shared, index), self._shared.get((shared, index), mark))
        name = f"{self.seed}|{self._step}|{index}|" + (f"shared|{shared}" if shared else site_id)
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "little")

    def _register(self) -> None:
        self._handle = next(_handles)
        _contexts[self._handle] = self

    def __getstate__(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "_step": self._step,
            "_forwards": dict(self._forwards),
            "_keys": dict(self._keys),
            "_shared": dict(self._shared),
            "_of_batch": dict(self._of_batch),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._labelled = {}
        self._register()


def _remember(table: dict[Entry, Value], entry: Entry, value: Value) -> Value:
    """Write something down, and forget the oldest where there is too much."""
    table[entry] = value
    if len(table) > _KEPT:
        del table[next(iter(table))]
    return value


# An operator, so that a compiled model can ask for keys; by handle, so that no step changes its graph.
@torch.library.custom_op("dropsurgery::key", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _key(handle: int, site_id: str, shared: str, of_batch: bool, mark: Tensor) -> Tensor:
    return torch.tensor(_contexts[handle]._next(site_id, shared, of_batch, int(mark)), device=_CPU)


@_key.register_fake
def _(handle: int, site_id: str, shared: str, of_batch: bool, mark: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=_CPU)
