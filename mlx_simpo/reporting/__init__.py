"""What users see on the terminal: notes, warnings, progress and tables."""
