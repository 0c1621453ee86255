"""Benchmark results: statistics, records, references, verdicts and their pages. No torch; measure/ has the clocks."""
