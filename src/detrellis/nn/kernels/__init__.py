"""Functions with several paths:
deformable attention, RoIAlign and matrix products, by device and input.
"""
