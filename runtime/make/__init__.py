"""`fitune data make`: instruction rows from documents or topics, through an OpenAI-compatible endpoint."""
