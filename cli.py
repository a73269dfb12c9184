"""Runs prunekit from a checkout, without installing it."""

from prunekit.cli import main

main()
