"""The lecture's arithmetic: 2 + 2 + 8 bytes a parameter, and what `fitune explain` says of it."""
