"""Measurements of the papers:
one a file, each a figure, a table and JSON over several runs. See docs/analysis.md.
"""
