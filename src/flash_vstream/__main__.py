"""``python -m flash_vstream`` runs the command line."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C while it is still being imported ends it without a traceback, too."""
    try:
        from flash_vstream.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
