"""Certify many models: in worker processes, with progress, into a file from which a later run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dropsurgery.analysis.certify import FAILED, TRACES, VALUES, Certificate, certify
from dropsurgery.analysis.pool import Lost, Pool
from dropsurgery.analysis.progress import bar
from dropsurgery.errors import SurgeryError
from dropsurgery.recipe import Recipe

_HEAVY = 100_000_000  # parameters; with values, gradients and copies, some gigabytes
_LIBRARIES = ("torch", "timm", "segmentation-models-pytorch", "torchvision")
_HOUSE = Path(__file__).resolve().parents[1]

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Task:
    """One model to certify, by traces or by values."""

    model: str
    kind: str
    parameters: int = 0


@dataclass(frozen=True)
class Options:
    """How to sweep.

    Attributes:
        recipe: what to insert; None puts dropout everywhere.
        jobs: worker processes.
        limit: seconds for one model.
        values: "smallest" of each family and class, "all" or "none" are compared by values too.
        file: where certificates are kept, one JSON a line.
        fresh: begin the file anew.
    """

    recipe: Recipe | None = None
    jobs: int = 1
    limit: float = 600.0
    values: str = "smallest"
    file: Path = Path("certify.jsonl")
    fresh: bool = False


def sweep(names: Sequence[str], options: Options) -> Iterator[Certificate]:
    """Certify models by name, in order; gives all their certificates, first those of earlier runs.

    Args:
        names: of models, as `make_model` takes them.
        options: how.
    """
    book = _Book(options)
    pool = Pool(partial(_certificate, recipe=options.recipe), options.jobs, options.limit, _heavy)
    with pool, bar("{task.fields[trouble]} in trouble") as shown:

        def run(what: str, tasks: list[Task]) -> Iterator[Certificate]:
            known = {task: made for task in tasks if (made := book.get(task)) is not None}
            trouble = sum(not made.sound for made in known.values())
            row = shown.add_task(what, total=len(tasks), completed=len(known), trouble=trouble)
            yield from known.values()
            for task, answer in pool.run(task for task in tasks if task not in known):
                made = _lost(task, answer) if isinstance(answer, Lost) else answer
                book.add(made)
                trouble += not made.sound
                shown.update(row, advance=1, trouble=trouble)
                yield made

        traced = []
        for made in run("by traces", [Task(name, TRACES) for name in names]):
            traced.append(made)
            yield made
        yield from run("by values", list(_to_compare(traced, options.values)))


def _certificate(task: Task, recipe: Recipe | None) -> Certificate:
    torch.set_num_threads(1)  # there is a worker for each core
    return certify(task.model, recipe, kind=task.kind)


def _heavy(task: Task) -> bool:
    return task.parameters > _HEAVY


def _lost(task: Task, lost: Lost) -> Certificate:
    return Certificate(task.model, task.kind, "", status=FAILED, reason=lost.reason, parameters=task.parameters)


def _to_compare(traced: Iterable[Certificate], which: str) -> Iterator[Task]:
    """The models to compare by values: the smallest ones first."""
    able = sorted((made for made in traced if made.nodes and made.compared == TRACES), key=lambda made: made.parameters)
    families: dict[Any, Certificate] = {}
    for made in able if which != "none" else ():
        families.setdefault(made.model if which == "all" else (made.family, made.cls), made)
    return (Task(made.model, VALUES, made.parameters) for made in families.values())


# -- the file --------------------------------------------------------------------------------------------------
class _Book:
    """The certificates of this run and, from the file, of earlier ones with the same versions and recipe."""

    def __init__(self, options: Options) -> None:
        self._file = options.file
        self._recipe = _mark(options.recipe)
        self._versions = versions()
        self._known: dict[Key, Certificate] = {}
        text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
        kept = "" if options.fresh else text[: text.rfind("\n") + 1]  # a run that was ended cuts a line off
        if kept != text or not self._file.exists():
            self._file.write_text(kept, encoding="utf-8")
        for made in read(self._file):
            if made.versions == self._versions and made.recipe == self._recipe:
                self._known[made.model, made.kind, made.recipe] = made

    def get(self, task: Task) -> Certificate | None:
        return self._known.get((task.model, task.kind, self._recipe))

    def add(self, made: Certificate) -> None:
        made.versions, made.recipe = self._versions, self._recipe
        self._known[made.model, made.kind, made.recipe] = made
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(made.to_json(), ensure_ascii=False) + "\n")


def read(file: Path) -> list[Certificate]:
    """The certificates in a file, in order.

    Raises:
        SurgeryError: the file holds something else.
    """
    known = {each.name for each in fields(Certificate)}
    made = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            facts = json.loads(line)
            made.append(Certificate(**{key: value for key, value in facts.items() if key in known}))
        except (ValueError, TypeError, AttributeError) as error:
            where, got = f"{file}:{number}", repr(line[:60])
            raise SurgeryError(f"{where}: expected a certificate as JSON, got {got} ({error})") from None
    return made


def versions() -> dict[str, str]:
    """What a certificate holds for: the libraries' versions, and a digest of this package's own sources."""
    sources = sorted(_HOUSE.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    found = {"dropsurgery": f"{metadata.version('dropsurgery')}+{digest}"}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _mark(recipe: Recipe | None) -> str:
    """The name of a recipe with a digest of what it says: one that was changed since is another."""
    if recipe is None:
        return ""
    text = json.dumps(recipe.to_dict(), sort_keys=True, default=str)
    return f"{recipe.name}+{hashlib.sha256(text.encode()).hexdigest()[:12]}"
