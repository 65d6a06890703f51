"""From files and data sets to batches of tokens: sources → pairs → encode → batching."""
