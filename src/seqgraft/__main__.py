"""``python -m seqgraft`` and the ``seqgraft`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs a command; errors that a user can cause become one message and an exit code, anything else a traceback."""
    from seqgraft.cli import app
    from seqgraft.errors import SeqgraftError

    try:
        app()
    except SeqgraftError as error:
        sys.stderr.write(f"seqgraft: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
