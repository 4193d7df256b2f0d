"""Detrellis trains DETR-family object detectors on your own data."""

__version__ = "0.1.0"
