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

    Some users of a tensor: `also` are arguments of other nodes that take the same tensor, and get the same result of
    one call; `but` are the users of `node` that keep its output as it is. `module` is the path of what carries an edit
    out where that is neither the node's owner nor what it calls. `beside` names edges whose tensors a regularizer may
    take as well.
    """

    node: fx.Node
    operand: int | tuple[int, int] | None = None
    layer: bool = False
    also: tuple[tuple[fx.Node, int | tuple[int, int]], ...] = ()
    but: tuple[fx.Node, ...] = ()
    module: str | None = None
    beside: tuple[tuple[str, Edge], ...] = ()

    def layer_module(self) -> Any:
        """The layer to be swapped, where it is one."""
        if self.module is None:
            return self.node.meta["module"]
        return self.node.graph.owning_module.get_submodule(self.module)  # type: ignore[union-attr]

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
class GateFact:
    """What is known of the gate of a mixture of experts that a site belongs to.

    `gate` names it: the same for all sites of one gate. `axis` is the experts' axis of the tensor at this site, counted
    from the end; None where it has none. `k` experts are chosen for each token, None where all are mixed (a dense
    gate) or where that is not known. `scores` is what makes weights of logits ("softmax", "sigmoid"), `order` how they
    and the choice follow each other ("softmax_topk", "topk_softmax", "argmax_onehot", "dense"; "unknown" where only
    the layer is in reach). `bias_corrected`: a tensor is added to the scores for the choice alone. `capacity_axis`: the
    axis of the logits along which the chosen are counted up; None where nothing limits how many tokens an expert takes.
    `returned`: the raw logits leave the gate too, for balance losses. `features` is the width of what the scorer reads.
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


@dataclass(frozen=True)
class Site:
    """One place where a regularizer can go, with the facts that recipes select by.

    `id` is `path[#call]:pattern.edge`, stable over captures of the same model: the key of seeds, state and
    lock files. `shape` is that of the example input; `channel_axis` counts as in it (NCHW: 1, tokens and NHWC: -1).
    `producer` are the kinds of the operation that the value comes from ("activation", "relu"; "norm", "batch_norm"),
    `gate` what is known of the gate of a mixture of experts that it belongs to.
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
    gate: GateFact | None = None
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
class Behind:
    """What a tensor goes to while its channels are still apart, before a layer mixes them.

    `norms` are the paths of batch norms there; `stream` is the path of a residual addition (or of the module that does
    it) whose shortcut the tensor is, empty where it is none.
    """

    norms: tuple[str, ...] = ()
    stream: str = ""
