"""Attacks a server, beside a caller who must not feel it."""
