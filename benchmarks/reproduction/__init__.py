"""The experiments of ``benchmarks/reproduce.py``: one file each."""
