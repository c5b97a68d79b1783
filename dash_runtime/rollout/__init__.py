"""Many tokens at once through the layers, along the paths that policies and plans take."""
