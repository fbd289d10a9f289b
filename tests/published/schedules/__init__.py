"""What optax makes of its schedules, and the script that asked it.

``cd tests && python -m published.schedules.record`` writes ``optax.json`` again.
"""
