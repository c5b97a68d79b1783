"""Matrices by precision: as loaded, in INT8 and in INT4."""
