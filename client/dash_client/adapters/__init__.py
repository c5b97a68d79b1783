"""Adapters to other libraries: a LangChain chat model, and a plugin for the `llm` command.

Each needs its own extra; importing this package needs none.
"""
