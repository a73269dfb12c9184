"""Tables, plots and pages that show artifacts; nothing is computed here.

What draws is imported when it is first looked at (``__init__.pyi`` lists it): tables on the terminal need no plotting library.
"""

from prunekit.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
