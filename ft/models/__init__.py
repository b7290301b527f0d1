"""The policy: loading, quantised and adapted layers, layouts, log-probs."""
