"""From recorded bags to a checkpoint folder. Imports no ROS."""
