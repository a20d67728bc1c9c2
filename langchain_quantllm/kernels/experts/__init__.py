"""Products of rows with the experts that they are routed to."""
