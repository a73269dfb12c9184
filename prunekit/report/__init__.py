"""Tables, plots and pages that show artifacts; nothing is computed here.

What draws is imported when it is first looked at (``__init__.pyi`` lists it): tables on the terminal need no plotting library.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
