"""The rows of the table of optimizers, a file for each kind."""
