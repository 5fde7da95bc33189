"""Who computes which file of ``data/``: one module per stage, over the library."""
