"""Every router class of the installed transformers, alone and in the block that holds it: which are found as gates.

    python -m dropsurgery.analysis.routers            a table, and what came of each class
    python -m dropsurgery.analysis.routers Mixtral    those whose name has this word

A class is built from the default configuration of its model with small sizes, and captured on random numbers. Alone
there are no experts in sight: what is found is a candidate. In its block it is matched; there the logits of all experts
but the first k are masked, and a gate that still chooses another one, or gives it a weight, is wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import pkgutil
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dropsurgery.capture import Captured, capture
from dropsurgery.errors import CaptureError, SurgeryError
from dropsurgery.matching import Found, find
from dropsurgery.patterns.moe_gate import PATTERN
from dropsurgery.planning import Sites
from dropsurgery.records import Edit, GateFact
from dropsurgery.rewriting import rewrite

_NAMED = re.compile(r"(Router|TopKGating|MoE\w*Gate)$")
# Sizes that say nothing of a gate, by what configurations call them.
_SMALL = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "d_ff": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "shared_expert_intermediate_size": 16, "ffn_hidden_size": 48,
    "vocab_size": 64, "num_hidden_layers": 2, "expert_ffn_hidden_size": 16, "prefix_dense_intermediate_size": 16,
    "shared_intermediate_size": 16, "intermediate_size_mlp": 48, "router_hidden_size": 16, "moe_latent_size": 32,
    "moe_shared_expert_intermediate_size": 16, "moe_hidden_size": 32,
}  # fmt: skip
# Where the default configuration has none, or one.
_COUNTS = {
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "top_k_experts": 2, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
_TOKENS = (2, 6)


@dataclass(frozen=True)
class Row:
    """What came of one class: `result` is matched, candidate, refused, untraced or not built."""

    name: str
    result: str
    detail: str
    alone: str = ""
    gate: GateFact | None = None


def router_classes() -> Iterator[type[nn.Module]]:
    """The classes of the installed transformers that are named like routers."""
    models = importlib.import_module("transformers.models")
    for package in pkgutil.iter_modules(models.__path__):
        name = f"transformers.models.{package.name}.modeling_{package.name}"
        try:
            module = importlib.import_module(name)
        except Exception:  # an optional dependency of one model
            continue
        for each in vars(module).values():
            if (
                inspect.isclass(each)
                and issubclass(each, nn.Module)
                and each.__module__ == name
                and _NAMED.search(each.__name__)
            ):
                yield each


def tried(cls: type[nn.Module]) -> Row:
    """Build one class, look for its gate alone and in its block, and try that gate."""
    made = _built(cls)
    if isinstance(made, str):
        return Row(cls.__name__, "not built", made)
    config, router = made
    width = _width(config, router)
    alone, reason = _found(router, width)
    tries = [_in_block(block, width) for block in _blocks(cls)]
    for result, detail, fact in tries:
        if result in ("matched", "wrong"):
            return Row(cls.__name__, result, detail, alone, fact)
    if tries and alone == "untraced":
        return Row(cls.__name__, tries[0][0], tries[0][1], alone)
    return Row(cls.__name__, alone, reason, alone)


def _found(module: nn.Module, width: int) -> tuple[str, str]:
    """What is found in a module by itself, and why not more; where nothing is, on tokens in one row as well."""
    tries = []
    for flat in (False, True):
        captured = _captured(module, width, flat)
        if isinstance(captured, str):
            tries.append(("untraced", captured))
            continue
        tries.append(_result(find(captured.view.graph, PATTERN)))
        captured.view.release()
        if tries[-1][0] in ("matched", "candidate"):
            return tries[-1]
    return tries[0]


def _result(found: Found) -> tuple[str, str]:
    if found.matches:
        return "matched", ""
    nearest = found.nearest(1)
    if not nearest:
        return "refused", "no product with weights is activated or chosen from"
    if nearest[0].reason.startswith("candidate"):
        return "candidate", nearest[0].reason
    return ("untraced" if nearest[0].reason.startswith("unsupported") else "refused"), nearest[0].reason


def _in_block(block: nn.Module, width: int) -> tuple[str, str, GateFact | None]:
    captured = _captured(block, width)
    if isinstance(captured, str):
        return "untraced", captured, None
    result, reason = _result(find(captured.view.graph, PATTERN))
    if result != "matched":
        captured.view.release()
        return result, reason, None
    sites = Sites(captured)
    fact = sites.of("moe_gate", "logits")[0].gate if sites.of("moe_gate", "logits") else None
    try:
        wrong = _masked(captured, sites, block, width)
    except SurgeryError as error:
        wrong = f"not tried: {error}"
    captured.view.release()
    return ("wrong" if wrong else "matched"), wrong or f"in {type(block).__name__}", fact


# -- trying it -------------------------------------------------------------------------------------------------------
class _Mask(nn.Module):
    """Lets only the first experts be chosen."""

    def __init__(self, axis: int, kept: int) -> None:
        super().__init__()
        self.axis, self.kept = axis, kept

    def forward(self, logits: Tensor) -> Tensor:
        """Mask all others."""
        low = torch.finfo(logits.dtype).min / 2
        index = torch.arange(logits.shape[self.axis], device=logits.device)
        shape = [1] * logits.ndim
        shape[self.axis] = -1
        return torch.where((index < self.kept).view(shape), logits, low)


class _Watch(nn.Module):
    """Keeps what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, tensor: Tensor) -> Tensor:
        """Pass it on."""
        self.seen = tensor.detach().clone()
        return tensor


def _masked(captured: Captured, sites: Sites, block: nn.Module, width: int) -> str:
    """What is wrong where all experts but the first are masked; empty where nothing is."""
    wanted = {edge: sites.of("moe_gate", edge) for edge in ("logits", "selection", "indices", "probabilities")}
    if not wanted["logits"]:
        return "the logits cannot be reached"
    fact = wanted["logits"][0].gate
    assert fact is not None
    kept = max(fact.k or 1, 1)
    masks = [
        _edit(site, _Mask(site.gate.axis if site.gate and site.gate.axis is not None else -1, kept))
        for edge in ("logits", "selection")
        for site in wanted[edge]
    ]
    watches = [_edit(site, _Watch()) for edge in ("indices", "probabilities") for site in wanted[edge]]
    modules = {edit.site.id: module for edit, module in (*masks, *watches)}
    gm = rewrite(captured, [edit for edit, _ in (*masks, *watches)], lambda edit: modules[edit.site.id])
    with torch.no_grad():
        gm.eval()(*_inputs(block, width))
    return _judged(watches, fact, kept)


def _edit(site: Any, module: nn.Module) -> tuple[Edit, nn.Module]:
    return Edit(site, "insert", "dropout", 0.0, None, "sweep"), module


def _judged(watches: list[tuple[Edit, nn.Module]], fact: GateFact, kept: int) -> str:
    for edit, watch in watches:
        seen: Tensor | None = watch.seen  # type: ignore[assignment]
        if seen is None:
            return f"{edit.site.id} was not passed"
        axis = edit.site.gate.axis if edit.site.gate else None
        if edit.site.edge.startswith("indices") and int(seen.max()) >= kept:
            return f"expert {int(seen.max())} was chosen, of which all but {kept} were masked"
        if edit.site.edge.startswith("probabilities") and axis is not None:
            others = seen.movedim(axis, 0)[kept:]
            if others.numel() and float(others.abs().max()) > 1e-6:
                return "a masked expert has a weight"
        if edit.site.edge.startswith("probabilities") and not bool(torch.isfinite(seen).all()):
            return "weights are not finite"
    return ""


# -- building --------------------------------------------------------------------------------------------------------
def _built(cls: type[nn.Module]) -> tuple[Any, nn.Module] | str:
    """A configuration and a router of a class; or why there is none."""
    reasons = []
    for config in _configs(cls):
        try:
            return config, _filled(_constructed(cls, config))
        except Exception as error:
            reasons.append(f"{type(config).__name__}: {type(error).__name__}: {error}")
    return reasons[0] if reasons else "no configuration"


def _configs(cls: type[nn.Module]) -> Iterator[Any]:
    """The default configurations of a model's package with small sizes, that of the class's annotation first."""
    home = importlib.import_module(cls.__module__.replace("modeling_", "configuration_"))
    kinds = [each for each in vars(home).values() if inspect.isclass(each) and each.__module__ == home.__name__]
    kinds = [each for each in kinds if each.__name__.endswith("Config")]
    annotated = next(iter(list(inspect.signature(cls.__init__).parameters.values())[1:]), None)
    name = str(getattr(annotated, "annotation", "")).rpartition(".")[2].strip("'\">")
    for kind in sorted(kinds, key=lambda each: (each.__name__ != name, -sum("expert" in key for key in _fields(each)))):
        try:
            yield _shrunk(kind())
        except Exception:
            continue


def _fields(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)


def _shrunk(config: Any) -> Any:
    for name, value in (*_SMALL.items(), *_COUNTS.items()):
        with contextlib.suppress(Exception):
            known = getattr(config, name, "")
            if known != "" and (known in (None, 1) if name in _COUNTS else isinstance(known, int)):
                setattr(config, name, value)
    for inner in ("ffn_config", "text_config"):
        if hasattr(getattr(config, inner, None), "to_dict"):
            _shrunk(getattr(config, inner))
    return config


def _constructed(cls: type[nn.Module], config: Any) -> nn.Module:
    given: dict[str, Any] = {}
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        known = _value(parameter.name, config)
        if known is not None:
            given[parameter.name] = known
        elif parameter.default is parameter.empty:
            raise TypeError(f"an argument {parameter.name!r} that is not known")
    return cls(**given)


def _value(name: str, config: Any) -> Any:
    if "config" in name:
        inner = getattr(config, name, None)
        return inner if inner is not None else config
    if name in ("layer_idx", "layer_id", "layer_index"):
        return 1
    aliases = {
        "input_size": ("hidden_size",), "hidden_size": ("hidden_size",), "dim": ("hidden_size",),
        "num_experts": ("num_local_experts", "num_experts"), "top_k": ("num_experts_per_tok",),
        "ffn_dim": ("encoder_ffn_dim",),
    }  # fmt: skip
    return next((getattr(config, key) for key in (name, *aliases.get(name, ())) if hasattr(config, key)), None)


def _filled(module: nn.Module) -> nn.Module:
    """Random numbers as weights and small ones as buffers: torch's empty ones could be anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scale, tensors in ((0.3, module.parameters()), (1.0, module.buffers())):
            for tensor in tensors:
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return module.float().eval()


def _width(config: Any, router: nn.Module) -> int:
    """The width of what a router reads."""
    for name in ("hidden_dim", "hidden_size", "input_size", "in_features", "dim"):
        if isinstance(getattr(router, name, None), int):
            return int(getattr(router, name))
    for home in (config, getattr(config, "text_config", None)):
        for name in ("hidden_size", "d_model", "n_embd"):
            if isinstance(getattr(home, name, None), int):
                return int(getattr(home, name))
    linear = next((module for module in router.modules() if isinstance(module, nn.Linear)), None)
    return linear.in_features if linear is not None else 32


def _blocks(cls: type[nn.Module]) -> list[nn.Module]:
    """The modules of the same file that make a router of this class, the smallest first."""
    home = importlib.import_module(cls.__module__)
    made = []
    for each in list(vars(home).values()):
        if (
            inspect.isclass(each)
            and issubclass(each, nn.Module)
            and each.__module__ == home.__name__
            and each is not cls
        ):
            made += _holding(cls, each)
    return sorted(made, key=lambda block: len(list(block.modules())))


def _holding(cls: type[nn.Module], home: type[nn.Module]) -> list[nn.Module]:
    """A module of a class that makes a router of the other one, under the first configuration that does."""
    try:
        if f"{cls.__name__}(" not in inspect.getsource(home.__init__) or home.forward is nn.Module.forward:
            return []
    except (OSError, TypeError):
        return []
    for config in _configs(cls):
        try:
            block = _filled(_constructed(home, config))
        except Exception:
            continue
        if any(isinstance(module, cls) for module in block.modules()):
            return [block]
    return []


def _captured(module: nn.Module, width: int, flat: bool = False) -> Captured | str:
    given = _inputs(module, width)
    if flat:
        given[0] = given[0].flatten(0, -2)
    try:
        return capture(module, tuple(given))
    except (CaptureError, SurgeryError) as error:
        cause = error.__cause__
        return f"{type(cause).__name__}: {cause}" if cause is not None else str(error)


def _inputs(module: nn.Module, width: int) -> list[Any]:
    """What a forward takes: hidden states, as sequences or in one row, and token ids where it asks for them."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(*_TOKENS, width, generator=generator)
    given: list[Any] = []
    for parameter in inspect.signature(type(module).forward).parameters.values():
        if parameter.name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if not given:
            given.append(states)
        elif parameter.default is not parameter.empty:
            break
        elif "ids" in parameter.name:
            given.append(torch.zeros(_TOKENS, dtype=torch.long))
        else:
            given.append(None)
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        try:
            module(*given)
        except Exception:
            given[0] = states.flatten(0, 1)
    return given


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| class | result | alone | experts | chosen | order | remarks |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row.result, row.name)):
        gate = row.gate
        cells = (
            [gate.experts, gate.k or "", gate.order + (" + bias" if gate.bias_corrected else "")]
            if gate
            else ["", "", ""]
        )
        detail = " ".join(row.detail.split())[:160].replace("|", "/")
        lines.append("| " + " | ".join(map(str, (row.name, row.result, row.alone, *cells, detail))) + " |")
    counts = Counter(row.result for row in rows)
    total = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    return "\n".join([*lines, "", f"{len(rows)} classes: {total}."])


def main(words: list[str], write: Callable[[str], Any] = sys.stdout.write) -> list[Row]:
    """Try all classes whose names have one of the words, or all; write the table."""
    logging.disable(logging.WARNING)
    classes = [cls for cls in router_classes() if not words or any(word in cls.__name__ for word in words)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [tried(cls) for cls in classes]
    write(table(rows) + "\n")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
