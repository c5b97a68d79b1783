"""Turns a folder of files into an engine: loads, fits and measures before the first request."""
