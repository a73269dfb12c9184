"""Runs prunekit from a checkout, without installing it."""

import sys

if __name__ == "__main__":
    try:
        from prunekit.cli import main
    except KeyboardInterrupt:  # importing torch takes seconds
        sys.exit("prunekit: interrupted")
    except ModuleNotFoundError as error:
        sys.exit(f"prunekit: {error.name} is not installed here; use .venv/bin/python (make demo makes it)")
    main()
