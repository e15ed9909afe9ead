"""Questions: one file, one question, one command."""
