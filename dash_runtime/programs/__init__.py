"""Compiled programs: the modules that Inductor traces, and the cache of the results."""
