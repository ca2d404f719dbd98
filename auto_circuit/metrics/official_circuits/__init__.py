"""Known circuits of published papers, and how well scores agree with them."""
