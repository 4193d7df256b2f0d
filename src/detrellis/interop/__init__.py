"""Checkpoints of other libraries, in and out:
Hugging Face's, and those of the reference repositories.
"""
