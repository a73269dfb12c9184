"""The zoo: kinds of real models, each walked through every step of prunekit with nothing written but a factory.

``python -m benchmarks.zoo`` writes the table in docs/zoo.md.
"""
