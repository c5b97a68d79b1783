"""Policies: they decide the action of each layer for each token."""
