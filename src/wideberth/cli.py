"""The command line: which command was meant. Nothing heavy is imported before that is known."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

COMMANDS = {
    "quickstart": "the papers' comparison in miniature on built-in data, ending in report.html",
    "train": "train a model by a recipe or by options, and leave a run directory",
    "evaluate": "clean accuracy and accuracy under attack of a model, each adversarial point verified",
    "verify": "check every adversarial point of an evaluation again, in seconds",
    "margins": "effective margins of a model, sample by sample",
    "compare": "one table and one trade-off plot of several runs",
    "report": "the self-contained report.html of one or several runs",
    "recipes": "what ships, with its published numbers",
}


def usage() -> str:
    """The page that `wideberth --help` prints."""
    lines = [
        "usage: wideberth COMMAND [options]",
        "",
        "Train classifiers to be robust, and say, sample by sample, how robust they are.",
        "",
        *(f"  {name:<12}{what}" for name, what in COMMANDS.items()),
        "",
        "`wideberth COMMAND --help` tells the options of a command; 8/255 is a number wherever one is asked for.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 where `verify` disagrees, 2 for bad input (a line on stderr), 130 if interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"wideberth {version('wideberth')}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        print(f"wideberth: error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from wideberth.checks import InputError

    try:
        with notes_on_stderr():
            code = import_module(f"wideberth.commands.{name}").main(rest)
    except InputError as error:
        print(f"wideberth {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        # A full disk or a folder without permission: what was being written never replaced what was there.
        print(
            f"wideberth {name}: error: {error.strerror or error}: {error.filename or 'while writing'}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(
            f"wideberth {name}: interrupted; what was finished is kept (train: continue with --resume)", file=sys.stderr
        )
        return 130
    return int(code or 0)


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Print what the library logs for its users (warnings, and why a run ended) on standard error, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("wideberth")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def program() -> int:
    """`main` as a process of its own, whose memory is its own affair."""
    from wideberth import memory

    memory.keep()
    return main()


if __name__ == "__main__":
    sys.exit(program())
