"""The graph, masks and contexts that users call, and other published paths."""
