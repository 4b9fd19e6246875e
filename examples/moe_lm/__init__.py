"""The parts of `examples/train_moe_lm.py`: settings, text, model, training loop, checkpoints, progress and report."""
