"""What experiments share: worlds, evaluation, verdicts, the grid, plots and the report."""
