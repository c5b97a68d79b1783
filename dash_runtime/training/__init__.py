"""Fitting what serving needs: the compensation of skipped layers."""
