"""Benchmarks: what a part costs beside its peers and limits, as ratios taken in one process."""
