"""What a run will need, predicted before it begins."""
