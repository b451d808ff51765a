"""demo_robot: on the ROS graph, an SO-101 under ros2_control with two cameras; behind it, MuJoCo.

Publishes joint_states (50 Hz), <camera>/image_raw, its /compressed and camera_info for base_camera and wrist_camera,
and episode (the task's text when an episode begins, "" when it ends). Takes
joint_trajectory_controller/joint_trajectory by that controller's rules and forward_position_controller/commands
(joints in the order of joint_states). Services: reset_episode, episode_outcome.

In real time it lives by the ROS clock. With `realtime_factor` other than 1, or `use_sim_time`, its own simulated
time counts, published on /clock, and every camera frame is rendered before time goes on.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from pi0_ros.demo.assets import AssetError
from pi0_ros.demo.camera_publisher import CameraPublisher
from pi0_ros.demo.controller import CommandError, Point
from pi0_ros.demo.scene import JOINTS
from pi0_ros.demo.simulation import PERIOD_NS, Simulation, TaskError
from pi0_ros.robot_file import RobotFileError
from pi0_ros.ros.conversions import SECOND, stamp_ns, to_stamp
from pi0_ros.ros.parameters import Parameters, Spec
from pi0_ros.ros.program import run_node
from pi0_ros.ros.qos import LATCHED, room_for_images
from pi0_ros.srv import EpisodeOutcome, ResetEpisode

STATE_PERIODS = 2  # controller periods between two joint states: 50 Hz
LATE = SECOND  # ns that the simulation may lag before it gives the lost time up
BURST = 50  # controller periods simulated at most before messages are looked at

SPECS = (
    Spec("seed", 0, "seed of the first episode: cubes, light, start pose", 0, 2**40, read_only=True),
    Spec("prompt", "", "task of the first episode; empty: drawn from the seed", read_only=True),
    Spec("width", 320, "width of the images, pixels", 16, 1920, read_only=True),
    Spec("height", 240, "height of the images, pixels", 16, 1080, read_only=True),
    Spec("rate", 20.0, "images a second from each camera, Hz", 0.1, 100, read_only=True),
    Spec("realtime_factor", 1.0, "simulated seconds a second; 0: as fast as possible", 0, 1000, read_only=True),
)


class RobotNode(Node):
    """The node. Everything but the cameras happens in callbacks of its executor's thread.

    Raises:
        ParameterError, TaskError: a parameter cannot be used.
        AssetError, RuntimeError: model files are missing, or nothing can be rendered.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("demo_robot", **options)
        self._cameras: CameraPublisher | None = None
        try:
            self._start(Parameters(self, SPECS))
        except BaseException:
            self.destroy_node()
            raise

    def _start(self, settings: Parameters) -> None:
        self._factor = settings["realtime_factor"]
        self._own_clock = self._factor != 1 or self.get_parameter("use_sim_time").value
        self._scene = threading.Lock()
        self._simulation = Simulation(settings["seed"], settings["prompt"])
        self._frame_ns = round(SECOND / settings["rate"])
        self._periods, self._ended = 0, False
        self._reset_at = 0  # ns

        self._states = self.create_publisher(JointState, "joint_states", 10)
        self._episode = self.create_publisher(String, "episode", LATCHED)
        self._clock_out = self.create_publisher(ClockMessage, "/clock", 10) if self._own_clock else None
        self._cameras = CameraPublisher(
            self, self._simulation.model, self._scene, (settings["width"], settings["height"])
        )
        self.create_subscription(
            JointTrajectory, "joint_trajectory_controller/joint_trajectory", self._on_trajectory, 10
        )
        self.create_subscription(Float64MultiArray, "forward_position_controller/commands", self._on_positions, 10)
        self.create_service(ResetEpisode, "reset_episode", self._on_reset)
        self.create_service(EpisodeOutcome, "episode_outcome", self._on_outcome)
        self._origin = time.time_ns() if self._own_clock else self.get_clock().now().nanoseconds
        self._began = time.monotonic_ns()
        self._simulation.skip(self._origin)
        self._next_frame = self._origin
        self._episode.publish(String(data=self._simulation.prompt))
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(PERIOD_NS / SECOND if self._factor else 1e-4, self._advance, clock=steady)
        self.get_logger().info(f"episode {self._simulation.seed}: {self._simulation.prompt}")

    def destroy_node(self) -> None:
        """Stop the cameras' thread, then the node."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None
        super().destroy_node()

    def _wanted_time(self) -> int:
        """The time to which the simulation should have come, ns."""
        if not self._own_clock:
            return self.get_clock().now().nanoseconds
        if self._factor == 0:
            return self._simulation.now + PERIOD_NS
        return self._origin + round((time.monotonic_ns() - self._began) * self._factor)

    def _advance(self) -> None:
        simulation, wanted = self._simulation, self._wanted_time()
        lag = wanted - simulation.now
        if not self._own_clock and abs(lag) > LATE:
            self.get_logger().warning(f"the clock is {lag / SECOND:.1f} s ahead of the simulation: time skipped")
            simulation.skip(lag)
            self._next_frame = simulation.now
        for _ in range(BURST):
            if wanted - simulation.now < PERIOD_NS:
                return
            simulation.step()
            self._publish()

    def _publish(self) -> None:
        simulation = self._simulation
        self._periods += 1
        if self._clock_out is not None:
            self._clock_out.publish(ClockMessage(clock=to_stamp(simulation.now)))
        if self._periods % STATE_PERIODS == 0:
            state = JointState(name=list(JOINTS))
            state.position, state.velocity = simulation.positions.tolist(), simulation.velocities.tolist()
            state.header.stamp = to_stamp(simulation.now)
            self._states.publish(state)
        if simulation.now >= self._next_frame:
            missed = (simulation.now - self._next_frame) // self._frame_ns
            self._next_frame += (missed + 1) * self._frame_ns
            if self._cameras.wanted:
                self._cameras.offer(simulation.now, simulation.data.qpos)
                if self._own_clock:
                    self._cameras.finish()
        if not self._ended and simulation.outcome().done:
            self._end()

    def _end(self) -> None:
        outcome = self._simulation.outcome()
        self._ended = True
        self._episode.publish(String(data=""))
        self.get_logger().info(f"episode {outcome.seed}, {outcome.prompt}: {outcome.reason}, {outcome.seconds:.2f} s")

    def _on_trajectory(self, message: JointTrajectory) -> None:
        if 0 < stamp_ns(message.header.stamp) < self._reset_at:
            return  # meant for the scene before, and still on its way when that ended
        points = [
            Point(stamp_ns(point.time_from_start), point.positions, point.velocities, point.accelerations)
            for point in message.points
        ]
        try:
            self._simulation.controller.accept(
                message.joint_names, points, stamp_ns(message.header.stamp), self._simulation.now
            )
        except CommandError as error:
            self.get_logger().warning(f"trajectory refused: {error}", throttle_duration_sec=1.0)

    def _on_positions(self, message: Float64MultiArray) -> None:
        try:
            self._simulation.controller.hold(message.data)
        except CommandError as error:
            self.get_logger().warning(f"position command refused: {error}", throttle_duration_sec=1.0)

    def _on_reset(self, request: ResetEpisode.Request, response: ResetEpisode.Response) -> ResetEpisode.Response:
        try:
            with self._scene:
                self._simulation.reset(request.seed, request.prompt)
                self._reset_at = self._simulation.now
        except TaskError as error:
            response.message = str(error)
            return response
        if not self._ended:
            self._episode.publish(String(data=""))
        self._ended = False
        self._episode.publish(String(data=self._simulation.prompt))
        self.get_logger().info(f"episode {request.seed}: {self._simulation.prompt}")
        response.success, response.prompt = True, self._simulation.prompt
        return response

    def _on_outcome(self, _: EpisodeOutcome.Request, response: EpisodeOutcome.Response) -> EpisodeOutcome.Response:
        outcome = self._simulation.outcome()
        for name in ("done", "success", "reason", "seed", "prompt", "seconds", "closest"):
            setattr(response, name, getattr(outcome, name))
        return response


def main(args: list[str] | None = None) -> int:
    """Run the robot until it is told to end; 1 and one line on stderr when it cannot start."""
    os.environ.update(room_for_images())
    return run_node("demo_robot", SPECS, RobotNode, errors=(TaskError, AssetError, RobotFileError), args=args)


if __name__ == "__main__":
    sys.exit(main())
