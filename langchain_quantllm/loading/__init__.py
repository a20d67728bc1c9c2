"""Loading: from a model id and a scheme to a transformers pipeline, shared by all instances of the same model."""
