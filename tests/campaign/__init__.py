"""Longer trials of what must never go wrong, each a function that counts; too long for the tests."""
