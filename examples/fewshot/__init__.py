"""Few-shot image classification: data sets, episodes and networks for the examples."""
