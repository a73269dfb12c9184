"""``python -m prunekit``."""

import os
import sys

if __name__ == "__main__":
    # The working folder is first on the path here; inside a run folder its files would pass for libraries. What a user's own
    # modules need is added again, last and never from a run folder (prunekit/imports.py).
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    try:
        from prunekit.start import main
    except KeyboardInterrupt:  # before anybody listens
        os.write(2, b"prunekit: interrupted\n")
        os._exit(130)
    main()
