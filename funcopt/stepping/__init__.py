"""What an update does between trees of tensors and the executors' lists of leaves."""
