"""The ROS 2 side: with the demo and the benchmark of the node, all that imports rclpy."""
