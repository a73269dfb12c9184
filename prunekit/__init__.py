"""prunekit: make a trained model smaller, and see why each weight stayed or went.

What is offered here is listed in ``__init__.pyi`` and imported when it is first looked at.
"""

from prunekit.lazy import attach
from prunekit.version import __version__

__getattr__, __dir__, __all__ = attach(__name__, __file__)
__all__ = [*__all__, "__version__"]
