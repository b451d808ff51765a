"""Run and train pi0 and pi0.5 policies on a real arm under ROS 2."""
