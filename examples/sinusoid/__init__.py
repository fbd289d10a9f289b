"""The sinusoid example's parts: the tasks, the methods, the picture."""
