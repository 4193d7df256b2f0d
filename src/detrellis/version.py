"""The version, in a room that every other one may import."""

__version__ = "0.2.0"
