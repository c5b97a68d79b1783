"""Backends, which run a decoder's layers and head: eagerly, as compiled programs, as CUDA graphs."""
