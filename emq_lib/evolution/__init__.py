"""Evolution: primitives, genotypes and their text, the evaluator, the search, the Triton kernel."""
