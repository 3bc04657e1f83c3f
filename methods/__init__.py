"""What trains: losses, pure steps, samplers, metrics, data and the training loop."""
