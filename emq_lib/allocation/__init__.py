"""Allocation: exact, approximate, and as published code does it."""
