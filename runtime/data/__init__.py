"""The data: files to rows, rows to tokens, tokens to batches; and the check of all that."""
