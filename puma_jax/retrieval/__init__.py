"""Search and evaluation: what a query finds, and whether it is what it should find."""
