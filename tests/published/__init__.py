"""What published implementations make of one problem, and the scripts that ran them.

``cd tests && python -m published.lion`` writes ``lion.json`` again; it needs what the
file names as its source.
"""
