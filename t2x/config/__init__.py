"""The tree of an experiment: its overrides, what must fit together, and what
a mesh makes of it.
"""
