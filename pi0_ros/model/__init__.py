"""The network in plain PyTorch: SigLIP, two Gemma experts under one attention, and the flow that turns noise into actions.

Knows nothing of robots or ROS. `config` has the sizes, `pi0.Pi0` is the model, `flow` has time, interpolation and the
noise sources, `checkpoint` reads weights.
"""
