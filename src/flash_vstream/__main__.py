"""``python -m flash_vstream`` is the command line."""

from flash_vstream.cli.main import main

main()
