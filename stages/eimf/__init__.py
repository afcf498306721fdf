"""What two or more stages must agree on. Imported by the numbered scripts, never run."""
