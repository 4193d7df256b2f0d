"""Rows of recipes trained under the same conditions, with several seeds, and a report on them.
See docs/compare.md.
"""
