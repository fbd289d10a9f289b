"""How a rule runs on lists of leaves: it knows no tree and no optimizer."""
