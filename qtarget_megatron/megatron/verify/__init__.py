"""Whether losses and gradients are right at a layout."""
