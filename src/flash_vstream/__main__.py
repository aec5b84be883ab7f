"""``python -m flash_vstream`` runs the command line."""

from flash_vstream.cli.main import main

main()
