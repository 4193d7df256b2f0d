"""Trained detectors as files that other runtimes execute,
and such files in the place of detectors here.
"""
