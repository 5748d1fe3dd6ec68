"""``python -m spa.cli``."""

from spa.cli import main

main()
