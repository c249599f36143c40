"""Labels of regularizers, after the taxonomy of Kukačka, Golkov, Cremers (2017, arXiv:1710.10686), and their table.

The words are those of a command line; what each is in that paper, `LABELS` says. Which label a method has, where the
paper has no row for it, is the library's reading. Of the paper's kinds of dependence, several together are its
"combination".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from dropsurgery.errors import SurgeryError

LABELS: Mapping[str, Mapping[str, str]] = {
    "transforms": {
        "data": "what travels through the net, the input or hidden features",
        "architecture": "the function that the net is: layers, connections, noise within it",
        "error": "the error function",
        "term": "a regularization term is added",
        "optimization": "initialization, updates or the end of the training",
    },
    "space": {"input": "the net's input", "hidden": "hidden features, or weights", "target": "the targets"},
    "randomness": {
        "random": "the transformation is drawn",
        "deterministic": "the same input is transformed in the same way",
        "adaptive": "the transformation is the result of an optimization",
    },
    "phase": {
        "training": "acts in training; to multiply by an expectation in the test is not counted as acting",
        "test": "acts in the test",
    },
    "dependence": {
        "none": "",
        "label": "t",
        "other_label": "t'",
        "sample": "x",
        "batch": "x_batch",
        "dataset": "D",
        "time": "time",
        "parameters": "π",
    },
}
"""The labels by key. What the drawn transformation hangs on is given as the paper writes it: p(θ | …)."""


@dataclass(frozen=True)
class Taxonomy:
    """Where a regularizer stands in the taxonomy: for each key of `LABELS` one label or several.

    Raises:
        SurgeryError: there is no such label.
    """

    transforms: str | tuple[str, ...]
    space: str | tuple[str, ...]
    randomness: str | tuple[str, ...] = "random"
    phase: str | tuple[str, ...] = "training"
    dependence: str | tuple[str, ...] = "none"

    def __post_init__(self) -> None:
        for key, labels in self.labels().items():
            if not labels or len(set(labels)) < len(labels):
                raise SurgeryError(f"taxonomy: expected one label or several different ones of {key}, got {labels!r}")
            for label in labels:
                _known(label, LABELS[key], f"{key} of a taxonomy")

    def labels(self) -> dict[str, tuple[str, ...]]:
        """Return all labels by key."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return {key: (value,) if isinstance(value, str) else tuple(value) for key, value in given.items()}

    def told(self) -> dict[str, str]:
        """Return the labels in words, one text a key; the dependence as the paper writes it, p(θ|x)."""
        labels = self.labels()
        dependence = ", ".join(filter(None, map(LABELS["dependence"].__getitem__, labels["dependence"])))
        words = {key: ", ".join(each) for key, each in labels.items()}
        return words | {"dependence": f"p(θ|{dependence})" if dependence else "p(θ)"}


def conditions(where: str) -> list[tuple[str, str]]:
    """Read `phase=training,random`: conditions set apart by commas, each key=label or a label alone; (key, label).

    Raises:
        SurgeryError: there is no such key or label, or a label is missing.
    """
    return [_condition(text.strip()) for text in where.split(",")]


def meets(taxonomy: Taxonomy | None, wanted: Iterable[tuple[str, str]]) -> bool:
    """Whether a taxonomy has all the labels that are wanted; what has no taxonomy has none."""
    if taxonomy is None:
        return not list(wanted)
    labels = taxonomy.labels()
    return all(label in labels[key] for key, label in wanted)


def markdown(rows: Sequence[tuple[str, Taxonomy | None]]) -> str:
    """Return a table of names and their labels, in markdown."""
    heads = ["regularizer", *LABELS]
    cells = [[f"`{name}`", *_cells(taxonomy)] for name, taxonomy in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *cells))


def _cells(taxonomy: Taxonomy | None) -> Iterable[str]:
    # In a table of markdown a bar begins the next cell.
    told = {} if taxonomy is None else taxonomy.told()
    return (told.get(key, "-").replace("|", "\\|") for key in LABELS)


def _condition(text: str) -> tuple[str, str]:
    key, given, label = (part.strip() for part in text.partition("="))
    if given:
        _known(key, LABELS, "key to select by")
        _known(label, LABELS[key], key)
        return key, label
    homes = {label: home for home, labels in LABELS.items() for label in labels}
    _known(text, homes, "label")
    return homes[text], text


def _known(name: str, known: Iterable[str], what: str) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {near[0]!r}? There are" if near else "there are"
        raise SurgeryError(f"no {what} {name!r}; {hint}: {', '.join(names)}")
