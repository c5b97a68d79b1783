"""The commands of `dash-client`, one module each, and their shared parts. Users import nothing from here.

A command's module has `run(arguments)`, which prints and returns an exit code. It is imported only to run the command.
"""
