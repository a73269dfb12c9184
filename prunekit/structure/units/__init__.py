"""The structures whose units leave whole: one file each, named as its structure is, which holds a ``STRUCTURE``."""
