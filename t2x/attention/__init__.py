"""Attention as functions of queries, keys and values: exact, blockwise, linear,
over kernels, over devices.
"""
