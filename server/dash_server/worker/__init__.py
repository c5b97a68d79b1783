"""The worker process, and the server's end of it: importing the folder itself imports no torch."""
