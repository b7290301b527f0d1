"""What is kept on disk: weights, adapters, checkpoints. safetensors and JSON only."""
