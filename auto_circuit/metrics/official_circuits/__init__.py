"""The true edges of published circuits, and how well scores agree with them."""
