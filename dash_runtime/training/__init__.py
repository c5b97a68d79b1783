"""Fits compensation and trains policies, offline."""
