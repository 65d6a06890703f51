"""Settings: each declared once, read strictly, and written back as YAML."""
