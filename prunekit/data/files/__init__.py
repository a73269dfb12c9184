"""Data in files: rows of text, pictures or recordings become batches for a model, in four splits."""
