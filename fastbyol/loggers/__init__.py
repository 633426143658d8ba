"""TensorBoard, W&B, MLflow and trackio, fed from a run's files by processes beside the training."""
