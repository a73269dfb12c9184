"""prunekit: make a trained model smaller, and see why each weight stayed or went.

What is offered here is listed in ``__init__.pyi`` and imported when it is first looked at.
"""

import lazy_loader

from prunekit.version import __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*__all__, "__version__"]
