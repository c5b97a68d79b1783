"""Metrics and traces of calls that are over. The service tells its observers of calls and knows nothing in here."""
