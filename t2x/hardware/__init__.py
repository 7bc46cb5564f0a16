"""Chips, topologies, compiler options, and machines that are not here."""
