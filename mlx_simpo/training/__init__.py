"""The optimizer step, the loop around it, and the session that prepares both."""
