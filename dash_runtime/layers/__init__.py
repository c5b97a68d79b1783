"""The parts of a layer: weights, arithmetic, the rows of a pass, the KV cache, compensation."""
