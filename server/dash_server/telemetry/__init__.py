"""Metrics and traces of calls. The service reports calls to its observers, and does not know this folder."""
