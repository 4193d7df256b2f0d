"""Broken inputs, made by seeds: annotations, images, checkpoints, overrides.
`tests/soak` tries many, CI a few.
"""
