"""Sequences, slots, steps and lanes: everything between a request and its tokens."""
