"""Measures the sampler, a training step and the node, alone and against transformers' PI0 in the same run."""
