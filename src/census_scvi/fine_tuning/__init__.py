"""Fine-tuning: which cells of a newer Census a model has not seen, the model extended by them, and what it is worth."""
