"""From a folder of files to an engine: what is loaded, fitted and measured before the first request."""
