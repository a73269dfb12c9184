"""Data in files: rows of text, pictures or recordings become batches for a model, in four splits.

``datasets`` and ``transformers`` are imported by the functions that need them; a plain install has none.
"""

from prunekit.data.files.options import Options, every_placed, placed

__all__ = ["Options", "every_placed", "placed"]
