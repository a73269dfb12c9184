"""A model passed block by block: its layers' inputs without holding more of it where it computes than one block at a time.

``stacks`` finds the rows of blocks that a model is, ``held`` keeps what goes into the next block for all samples, ``homes`` says
where weights lie meanwhile. ``Passing`` goes forwards, for those who change a block before the next one sees what it sends, and
``Abreast`` with two models; ``Row`` forwards and backwards, for criteria of models that are too large to be held as one vector.
"""

from prunekit.blocks.abreast import Abreast, Pair
from prunekit.blocks.held import ACTIVATIONS
from prunekit.blocks.homes import Home, InFiles, InMemory, Viewed
from prunekit.blocks.passing import Part, Passing
from prunekit.blocks.row import Row

__all__ = ["ACTIVATIONS", "Abreast", "Home", "InFiles", "InMemory", "Pair", "Part", "Passing", "Row", "Viewed"]
