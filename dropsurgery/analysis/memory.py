"""The peak of a process's memory over a stretch of work."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Bytes of resident memory, at the highest; known when the stretch is over."""

    bytes: int = 0


@contextmanager
def peak() -> Iterator[Peak]:
    """Measure from here to the end of the block; where the kernel keeps no such mark, since the process began."""
    with suppress(OSError):
        _RESET.write_text("5")
    made = Peak()
    try:
        yield made
    finally:
        made.bytes = _highest()


def _highest() -> int:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
