"""Compiled programs: what Inductor traces, and the cache of what it makes."""
