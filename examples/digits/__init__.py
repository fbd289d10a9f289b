"""The parts of `training_loop.py` and `finetune_then_differentiate.py`."""
