"""A fine-tuning: flags, data, step, log, outputs, resuming."""
