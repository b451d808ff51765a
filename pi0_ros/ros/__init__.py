"""The ROS 2 side: the only room, with the demo, that imports rclpy."""
