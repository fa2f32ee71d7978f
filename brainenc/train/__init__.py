"""Brain encoders trained from the feature store."""
