"""Co-DETR: auxiliary heads on the encoder's memory, and their positives as queries;
see `scheme`.
"""
