"""What certificates come to: counts, what is wrong where, and a table by family for keeping."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

from dropsurgery.analysis.certify import FAILED, OPAQUE, REFUSED, TRACES, UNBUILT, VALUES, WHOLE, Certificate

Pairs = list[tuple[str, str]]
Rows = list[tuple[str, ...]]


def counts(made: Sequence[Certificate]) -> dict[str, int]:
    """How many models are captured how, how many break a promise, and how many were compared by values."""
    traced = [each for each in made if each.kind == TRACES]
    by_status = Counter(each.status for each in traced)
    return {
        "models": len(traced),
        **{status: by_status[status] for status in (WHOLE, OPAQUE, REFUSED, UNBUILT, FAILED)},
        "the recipe does not fit": sum(bool(each.misfit) for each in traced),
        "compared by values": sum(each.compared == VALUES for each in made),
        "with broken promises": len({each.model for each in made if each.broken}),
    }


def offenders(made: Iterable[Certificate]) -> Rows:
    """(model, what, why) for each thing that is wrong."""
    rows: Rows = []
    for each in made:
        if each.status in (REFUSED, FAILED):
            rows.append((each.model, each.status, each.reason))
        rows.extend((each.model, "broken", line) for line in each.broken)
    return rows


def opaque_parts(made: Iterable[Certificate]) -> Rows:
    """(class, models, first model and path, why) for each kind of part that stays opaque."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in made:
        if each.kind == TRACES:
            for kind, part in {(part["class"], part["reason"]): part for part in each.opaque}.items():
                found.setdefault(kind, []).append(f"{each.model} {part['path']}".strip())
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [(cls, str(len(where)), where[0], reason) for (cls, reason), where in ordered]


def unbuilt(made: Iterable[Certificate]) -> Pairs:
    """(model, why) for what its own library cannot build."""
    return [(each.model, each.reason) for each in made if each.kind == TRACES and each.status == UNBUILT]


def misfits(made: Iterable[Certificate]) -> Pairs:
    """(model, why) for each model that the recipe does not fit."""
    return [(each.model, each.misfit) for each in made if each.kind == TRACES and each.misfit]


def facts(made: Sequence[Certificate]) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "counts": counts(made),
        "opaque": [dict(zip(("class", "models", "such as", "why"), row, strict=True)) for row in opaque_parts(made)],
        "not built": dict(unbuilt(made)),
        "misfits": dict(misfits(made)),
        "wrong": [dict(zip(("model", "what", "why"), row, strict=True)) for row in offenders(made)],
    }


def markdown(made: Sequence[Certificate], versions: dict[str, str]) -> str:
    """A table by family, with its date and versions."""
    by_family: dict[str, list[Certificate]] = {}
    for each in made:
        by_family.setdefault(each.family or "not built", []).append(each)
    total = ", ".join(f"{number} {what}" for what, number in counts(made).items() if number)
    heads = ("family", "models", WHOLE, OPAQUE, REFUSED, "broken", "capture ms", "of build", "sites in the smallest")
    lines = [
        "# Certified models",
        "",
        f"{date.today().isoformat()}: {total}.",
        ", ".join(f"{library} {version}" for library, version in versions.items()) + ".",
        "Capture: median over the family, in milliseconds and as a share of building the model on the meta device.",
        "",
        *(f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads))),
        *(f"| {' | '.join(_row(name, by_family[name]))} |" for name in sorted(by_family)),
    ]
    return "\n".join(lines) + "\n"


def _row(family: str, made: list[Certificate]) -> tuple[str, ...]:
    traced = [each for each in made if each.kind == TRACES]
    status = Counter(each.status for each in traced)
    broken = len({each.model for each in made if each.broken})
    captured = [each for each in traced if each.nodes]
    speed, sites = ("-", "-"), "-"
    if captured:
        seconds = [each.seconds["capture"] for each in captured]
        shares = [each.seconds["capture"] / each.seconds["build"] for each in captured]
        speed = (f"{1000 * statistics.median(seconds):.0f}", f"{statistics.median(shares):.2f}")
        smallest = min(captured, key=lambda each: each.parameters)
        found = ", ".join(f"{name} {number}" for name, number in smallest.sites.items() if number)
        sites = f"{smallest.model}: {found or 'none'}"
    refused = status[REFUSED] + status[FAILED]
    numbers = (len(traced), status[WHOLE], status[OPAQUE], refused, broken)
    return (family, *map(str, numbers), *speed, sites)
