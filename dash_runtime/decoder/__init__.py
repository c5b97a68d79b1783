"""The model itself: weights, kernels, cache, and one layer at a time."""
