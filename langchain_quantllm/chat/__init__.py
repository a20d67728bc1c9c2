"""Messages: what goes to a model by its chat template, and what its answer says."""
