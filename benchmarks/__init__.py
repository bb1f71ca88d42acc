"""What fitune is measured with: scripts that print a table and one JSON line. Run them from a checkout."""
