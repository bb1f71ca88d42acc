"""The rehearsal: the runtime's own step on fake tensors, and how its figures compare with measured ones."""
