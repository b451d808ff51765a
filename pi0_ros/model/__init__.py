"""The network in plain PyTorch: SigLIP, two Gemma stacks under one attention, and the flow from noise to actions.

Knows nothing of robots or ROS. `config` has the sizes, `pi0.Pi0` is the model, `flow` has time, interpolation and the
noise sources, `checkpoint` reads weights.
"""
