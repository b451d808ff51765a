"""An observation in robot units -> an action chunk in robot units. Imports neither ROS nor the trainer."""
