"""Files on disk: whole or not there, kept for later starts, read with errors that name them."""
