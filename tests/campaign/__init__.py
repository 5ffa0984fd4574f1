"""What may never go wrong, tried many times: `python -m tests.campaign`."""
