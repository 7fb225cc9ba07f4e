"""Floor 0: tables, percentiles, plots and traces: everything that shows a number to a person."""
