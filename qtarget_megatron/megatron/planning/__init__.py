"""Memory and traffic of a fine-tuning before anything is built."""
