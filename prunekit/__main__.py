"""``python -m prunekit``."""

import sys

if __name__ == "__main__":
    try:
        from prunekit.cli import main
    except KeyboardInterrupt:  # importing torch takes seconds
        sys.exit("prunekit: interrupted")
    main()
