"""One run on a GPU that proves and measures the CUDA worker. Needs nothing but Python and torch."""
