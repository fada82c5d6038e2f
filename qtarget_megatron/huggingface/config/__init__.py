"""A config.json as an architecture: families of models, and what they share."""
