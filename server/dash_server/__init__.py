"""The gRPC server: owns text, requests and the worker process; knows no tensors."""
