"""A simulated SO-101 that behaves on the ROS graph as a real one, its scripted teacher, and the demo."""
