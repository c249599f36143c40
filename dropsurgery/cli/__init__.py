"""The command `dropsurgery`: look at recipes, patterns and models, without writing code.

Exit codes: 0 all is fine, 1 the recipe or the model is at fault (one message, no traceback), 2 wrong usage,
130 stopped by Ctrl-C.
What is heavy (torch, model libraries) is imported by the command that needs it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from dropsurgery.cli.parser import make_parser
from dropsurgery.cli.printing import say
from dropsurgery.errors import SurgeryError, SurgeryWarning

_FLAGS = {"example_inputs": "--input", "total_steps": "--total-steps", "steps_per_epoch": "--steps-per-epoch"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives its exit code. Wrong usage is argparse's SystemExit(2)."""
    args = make_parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no arrow still gets its table
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries speak to programmers
            warnings.simplefilter("always", SurgeryWarning)
            warnings.showwarning = lambda message, *_: say(f"note: {message}")
            code: int = args.run(args)
        sys.stdout.flush()
    except SurgeryError as error:
        say(str(error) + _hints(str(error)))
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        say("stopped")
        return 130
    return code


def _hints(message: str) -> str:
    """What the words of the Python functions are called here."""
    return "".join(f"\n  (here, {word} is {flag})" for word, flag in _FLAGS.items() if word in message)
