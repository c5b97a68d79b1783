"""The engine: a layer-by-layer decoder, skip policies, and the loop that joins them.

Knows tensors; knows no gRPC, no protobuf, no processes, no environment variables. Importing this
package, `actions`, `config` or `errors` does not import torch.
"""
