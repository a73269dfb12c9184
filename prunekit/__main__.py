"""``python -m prunekit``."""

from prunekit.cli import main

main()
