"""Lets the libraries be imported where torchvision's operators cannot load."""

from benchmarks.zoo.operators import declare

declare()
