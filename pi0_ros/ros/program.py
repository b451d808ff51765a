"""What the programs of all nodes share: help, signals, one clear line when the node cannot start, an orderly end."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from pi0_ros.ros.diagnostics import DiagnosticsPublisher
from pi0_ros.ros.parameters import (
    ParameterError,
    Parameters,
    Spec,
    refuse_misspelt_sections,
    sections_of_files,
    tell_of_other_sections,
    usage,
)
from pi0_ros.wording import first_line

NodeType = TypeVar("NodeType", bound=Node)
_ending = threading.Event()  # set by SIGINT, SIGTERM and SIGHUP


def ending() -> bool:
    """Whether the process was told to end: for callbacks that take long."""
    return _ending.is_set()


def end() -> None:
    """End the process, as a signal would."""
    _ending.set()


def forget_ending() -> None:
    """What told the process to end has been heard: from now on `ending` tells of another time."""
    _ending.clear()


class RosLog(logging.Handler):
    """Passes on to a node's log what the package's rooms without ROS warn of."""

    def __init__(self, node: Node) -> None:
        super().__init__(logging.WARNING)
        self._logger = node.get_logger()
        logging.getLogger("pi0_ros").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._logger.warning(record.getMessage())
        except Exception:  # noqa: BLE001 - as logging's own handlers do: who warns must not fail of it
            self.handleError(record)

    def close(self) -> None:
        """Listen no more."""
        logging.getLogger("pi0_ros").removeHandler(self)
        super().close()


class ManagedNode(LifecycleNode):
    """A lifecycle node that starts by itself where its `autostart` parameter says so, and says why it cannot.

    A subclass sets `_diagnostics`, and has a `_teardown` that undoes half a configure too.

    Args:
        specs: its parameters.
        changed: see `Parameters`.

    Raises:
        ParameterError: a value given at start is refused.
    """

    _diagnostics: DiagnosticsPublisher
    _failure = ""  # why configure failed last

    def __init__(
        self,
        name: str,
        specs: Sequence[Spec],
        changed: Callable[[dict[str, Any]], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        asked = self._service_change_state.callback

        def change_state(request: Any, response: Any) -> Any:
            try:
                return asked(request, response)
            except RuntimeError as error:  # Jazzy's rclpy lets a transition that is not allowed now end the node
                self.get_logger().warning(f"no transition: {first_line(error)}")
                response.success = False
                return response

        self._service_change_state.callback = change_state
        try:
            self._settings = Parameters(self, specs, changed)
        except ParameterError:
            super().destroy_node()
            raise

    def _teardown(self) -> bool:
        """Give back all that configure took; whether that worked."""
        raise NotImplementedError

    @property
    def lifecycle(self) -> str:
        """The state: unconfigured, inactive, active or finalized."""
        return self._state_machine.current_state[1]

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give back what configure took."""
        return super().on_cleanup(state) if self._teardown() else TransitionCallbackReturn.ERROR

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give it back, for good."""
        self._teardown()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to unconfigured."""
        self._teardown()
        return super().on_error(state)

    def destroy_node(self) -> None:
        """Give back what configure took, then the node itself."""
        self._teardown()
        super().destroy_node()

    def _now(self) -> int:
        return self.get_clock().now().nanoseconds

    def autostart(self) -> None:
        """Configure and activate where the parameter says so. RuntimeError with the reason when that fails."""
        if self._settings["autostart"]:
            for transition in (self.trigger_configure, self.trigger_activate):
                if transition() != TransitionCallbackReturn.SUCCESS:
                    raise RuntimeError(self._failure or "the node could not be activated")
        else:
            self.get_logger().info("waiting to be configured and activated (-p autostart:=true does both)")

    def _configure_failed(self, error: Exception) -> TransitionCallbackReturn:
        """What `on_configure` answers to whatever was raised in it: rclpy would swallow that."""
        self._failure = f"configure failed: {' '.join(str(error).split()) or type(error).__name__}"
        self.get_logger().error(self._failure)
        self.get_logger().debug("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        self._teardown()
        self._diagnostics.publish()
        return TransitionCallbackReturn.FAILURE


def run_node(
    name: str,
    specs: Sequence[Spec],
    make: Callable[[], NodeType],
    *,
    start: Callable[[NodeType], None] | None = None,
    errors: tuple[type[Exception], ...] = (),
    args: list[str] | None = None,
) -> int:
    """Run a node until it is told to end, then destroy it; the exit code.

    SIGINT, SIGTERM and a terminal that is closed end it, however often they come: rclpy's own handlers would end the
    context before the node has come to rest, and launch passes on the Ctrl-C that the terminal has already sent.

    Args:
        specs: of the parameters, for --help.
        make: makes the node, in an initialised context.
        start: called when the node is on its executor, before it spins.
        errors: what `make` and `start` raise for mistakes of the user, beside ParameterError and RuntimeError: each is
            one line on stderr and exit code 1.
    """
    args = sys.argv if args is None else args
    if "--help" in args or "-h" in args:
        print(usage(name, specs))
        return 0
    node, code = None, 0
    _ending.clear()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_: _ending.set())
    try:
        if extra := remove_ros_args(args)[1:]:
            raise RuntimeError(f"{name} takes no {extra[0]!r}: give parameters by --ros-args -p NAME:=VALUE")
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        sections = sections_of_files(args)
        refuse_misspelt_sections(name, sections)
        node = make()
        tell_of_other_sections(node, name, sections)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        if start is not None:
            start(node)
        while rclpy.ok() and not ending():
            executor.spin_once(timeout_sec=0.1)
    except (ParameterError, RuntimeError, *errors) as error:
        if not ending():  # what was interrupted is no failure
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            code = 1
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return code
