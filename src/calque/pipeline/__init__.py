"""The method from inputs to report."""
