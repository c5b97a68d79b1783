"""The soak: load and faults on a service, on loopback. `make soak` runs all of it, tests/soak short versions."""
