"""The model: configuration, encoders, `DeepMSI`, checkpoints, prediction from files."""
