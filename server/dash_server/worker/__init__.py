"""The worker process and the server's link to it. Only `__main__` and `engine_loop` import torch."""
