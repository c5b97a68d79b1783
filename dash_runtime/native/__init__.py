"""Native code that takes rows through layers, compiled on the machine it runs on. `native.cpp` is its entry.

Knows matrices, memory and positions; knows no sequences, no policies' files and no passes.
"""
