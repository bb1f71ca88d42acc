"""`fitune`, and `python -m fitune.runtime`."""

from __future__ import annotations

import signal


def main() -> None:
    """The command line; until its modules are imported, Ctrl-C ends it without a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as run_command

    signal.signal(signal.SIGINT, before)
    run_command()


if __name__ == "__main__":
    main()
