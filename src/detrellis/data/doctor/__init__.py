"""The doctor: what is wrong with a data set, as findings;
the report of them; and what is dropped or fixed.
"""
