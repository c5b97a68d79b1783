"""Backends, which run a decoder's layers and head: eagerly, in native code, as CUDA graphs."""
