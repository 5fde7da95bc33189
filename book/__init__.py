"""The book: its chapters, the studies behind them, and how they become pages."""
