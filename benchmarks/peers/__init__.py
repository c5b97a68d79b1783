"""Peers that run in environments of their own: they bring their own torch, or clash with ours."""
