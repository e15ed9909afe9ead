"""Preferences and reinforcement, on a model that sft/ made."""
