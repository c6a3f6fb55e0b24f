"""What type checkers and editors see of the names that are made from the records of `ltkernels.losses`: one stub for each of
`adjustments`, `functional` and `nn`, which those modules import for type checkers only.

The stubs are written by ``python -m ltkernels._declared``, after every change of a record; a test compares them.
"""
