"""``python -m selfdoubt`` is the command ``selfdoubt``."""

from selfdoubt.cli import main

main()
