"""Estimators of meta-gradients side by side, on problems with exact answers."""
