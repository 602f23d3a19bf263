"""One file for each place where people train; none is imported unless it is used."""
