"""The run: the training step, the loop around it, what is measured meanwhile."""
