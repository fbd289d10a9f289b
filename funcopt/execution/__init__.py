"""How a rule runs on lists of leaves: of trees it knows the form, no optimizer at all."""
