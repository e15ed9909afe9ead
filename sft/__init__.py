"""Supervised training, and the chassis that the later stages drive on."""
