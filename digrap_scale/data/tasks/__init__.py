"""What a model is trained for: samples → batch, batch → loss and logits."""
