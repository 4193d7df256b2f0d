"""What real data sets get wrong, one case a kind:
each is built small, and says how it must be read or refused.
"""
