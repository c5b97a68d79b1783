"""The model itself, one layer at a time, and who runs its layers."""
