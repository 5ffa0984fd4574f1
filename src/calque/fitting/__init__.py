"""One layer or block fitted to its own float output."""
