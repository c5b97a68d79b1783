"""Who decides what is done with a layer."""
