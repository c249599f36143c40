"""The frozen records through which the stages meet: edges, sites, edits.

A site is an edge of the flat graph (`dropsurgery.capture`), or a node's output for all its users, together
with the facts that recipes select by.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Edge:
    """Where in a graph: the output of `node` for all its users, or (with `operand`) one argument of it.

    `operand` is the position of the argument: an index into `node.args`, or a pair (index, index) for an
    element of a list argument such as `torch.cat([a, b])`. `layer`: no edge, but the layer that the node calls.
    """

    node: fx.Node
    operand: int | tuple[int, int] | None = None
    layer: bool = False

    @property
    def source(self) -> fx.Node:
        """The node whose value travels over this edge."""
        if self.operand is None:
            return self.node
        at: Any = self.node.args
        for index in self.operand if isinstance(self.operand, tuple) else (self.operand,):
            at = at[index]
        if not isinstance(at, fx.Node):
            raise TypeError(f"operand {self.operand} of {self.node} is {at!r}, not a node")
        return at


@dataclass(frozen=True)
class Site:
    """One place where a regularizer can go, with the facts that recipes select by.

    `id` is `path[#call]:pattern.edge`, stable over captures of the same model: the key of seeds, state and
    lock files. `shape` is that of the example input; `channel_axis` counts as in it (NCHW: 1, tokens and NHWC: -1).
    `producer` are the kinds of the operation that the value comes from ("activation", "relu"; "norm", "batch_norm").
    """

    id: str
    module: str
    pattern: str
    edge: str
    stage: int | None = None
    reduction: int | None = None
    depth: float | None = None
    block: tuple[int, int] | None = None
    path: str | None = None
    role: str | None = None
    shape: tuple[int, ...] = ()
    channels: int | None = None
    channel_axis: int | None = None
    trainable: bool = True
    owner: str = ""
    producer: tuple[str, ...] = ()
    at: Edge | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Edit:
    """One regularizer at one site: what `rewrite` carries out. `eval_rule` says in words what it does in eval."""

    site: Site
    kind: str
    regularizer: str
    p: float
    schedule: Any
    entry: str
    arguments: dict[str, Any] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    eval_rule: str = "identity"


@dataclass(frozen=True)
class TensorFact:
    """What capture knows of a tensor: its shape and dtype on the example input."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class GateFact:
    """What is known of the gate of a mixture of experts that a site belongs to.

    Attributes:
        gate: names the gate, the same for all sites of one gate.
        experts: how many there are.
        axis: the experts' axis of the tensor on this edge, from the end; None where it has none.
        k: how many are chosen for each token; None for dense gates.
        scores: what makes weights of logits: "softmax", "sigmoid" …
        order: in which order scores and choice come: "softmax_topk", "topk_softmax", "argmax_onehot", "dense" …
        bias_corrected: whether a buffer is added between scores and choice.
        capacity_axis: the axis of the logits, from the end, along which an expert's tokens are counted; None: no limit.
        returned: whether raw logits leave the router besides.
        features: the length of what the scorer reads.
    """

    gate: str
    experts: int
    axis: int | None
    k: int | None
    scores: str
    order: str
    bias_corrected: bool
    capacity_axis: int | None
    returned: bool
    features: int | None = None
