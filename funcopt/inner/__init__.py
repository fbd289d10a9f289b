"""The inner loop: one step and its derivatives, many steps, and what they remember."""
