"""Measuring: phases and budget of an iteration, the plain published loop beside it, records and their comparison."""
