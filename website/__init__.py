"""The docs site: docs/ and what is generated from the code, built by zensical.
`python -m website` (make docs).
"""
