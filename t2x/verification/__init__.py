"""Whether a layout computes what one device does."""
