"""Judges policies beside the controls that they must beat at the same measured cost."""
