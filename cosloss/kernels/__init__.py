"""How an op is computed, one folder per backend; each has the same functions in the same order.

`dispatch` chooses between the backends.
"""
