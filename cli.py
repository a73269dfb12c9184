"""Runs prunekit from a checkout, without installing it."""

from prunekit.cli import main

if __name__ == "__main__":
    main()
