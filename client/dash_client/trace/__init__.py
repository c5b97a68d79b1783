"""The trace view: recorded decisions from messages, in files, and as a page. Imported only by programs that ask for it.

Knows no client and no connection.
"""
