"""Runs prunekit from a checkout, without installing it."""

import os

if __name__ == "__main__":
    try:
        from prunekit.start import main
    except KeyboardInterrupt:  # before anybody listens
        os.write(2, b"prunekit: interrupted\n")
        os._exit(130)
    main()
