"""``python -m prunekit``."""

import os
import sys

if __name__ == "__main__":
    # The working folder is first on the path here; inside a run folder its files would pass for libraries. What a user's own
    # modules need is added again, last and never from a run folder (prunekit/imports.py).
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    try:
        from prunekit.cli import main
    except KeyboardInterrupt:  # importing torch takes seconds
        sys.exit("prunekit: interrupted")
    except ModuleNotFoundError as error:
        sys.exit(f"prunekit: {error.name} is not installed here; use .venv/bin/python (make demo makes it)")
    main()
