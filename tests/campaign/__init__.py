"""Campaigns: what is too long for the suite, run by `python -m tests.campaign`; the suite runs a part of each."""
