"""How chapters become pages: their start, claims and ledger, plots, pages, slides, student copies."""
