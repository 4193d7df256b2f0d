"""A detector behind HTTP: `app` says what is answered,
`batcher` what goes through the detector together.
"""
