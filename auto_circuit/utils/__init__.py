"""The engine of edge patching and the small operations that it is built from."""
