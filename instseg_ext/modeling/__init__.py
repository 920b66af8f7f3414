"""Model parts that the methods share."""
