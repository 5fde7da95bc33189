"""The bench: sampling configurations, measuring them, and the table of what was measured."""
