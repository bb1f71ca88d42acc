"""The model: found, built as a strategy says, adapted, saved."""
