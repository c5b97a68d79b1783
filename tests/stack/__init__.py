"""The whole stack in containers, which `make test-stack` builds and runs."""
