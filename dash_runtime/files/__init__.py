"""Reads and writes files: atomically, as a cache for later starts, and with errors that name the file."""
