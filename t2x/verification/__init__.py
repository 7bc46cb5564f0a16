"""Checks that a layout computes the same numbers as one device."""
