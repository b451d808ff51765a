"""What all tests share: a ROS domain of the run's own, and fixtures that spin nodes until something holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pi0_ros.ros.domain import Domain

# Before anything imports rclpy. Held until this process ends; subprocesses of the tests inherit the variables.
DOMAIN = Domain()
os.environ.update(DOMAIN.environment())
os.environ.setdefault("MUJOCO_GL", "egl")
if not torch.cuda.is_available():  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"


class Ros:
    """A started rclpy, plain nodes made on demand, and one executor that spins all of them in this thread."""

    def __init__(self) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self._rclpy = rclpy
        rclpy.init()
        self.executor = SingleThreadedExecutor()
        self._nodes: list[Any] = []

    def node(self, name: str = "test", **options: Any) -> Any:
        """A new plain node, spun and in the end destroyed by this object."""
        return self.add(self._rclpy.create_node(name, **options))

    def add(self, node: Any) -> Any:
        """Spin a node that the test made; it is destroyed after the test."""
        self._nodes.append(node)
        self.executor.add_node(node)
        return node

    def spin_until(self, condition: Callable[[], Any], timeout: float = 20.0, what: str = "") -> Any:
        """Spin until `condition()` is true and return its value; fail the test after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"did not come about within {timeout:g} s: {what or getattr(condition, '__name__', '')}")
            self.executor.spin_once(timeout_sec=0.02)
        return value

    def call(self, client: Any, request: Any, timeout: float = 20.0) -> Any:
        """The answer of a service, waited for while all nodes spin."""
        self.spin_until(client.service_is_ready, timeout, f"service {client.srv_name} is there")
        future = client.call_async(request)
        self.spin_until(future.done, timeout, f"service {client.srv_name} answers")
        return future.result()

    def close(self) -> None:
        self.executor.shutdown()
        for node in self._nodes:
            node.destroy_node()
        self._rclpy.try_shutdown()


@pytest.fixture
def ros() -> Iterator[Ros]:
    pytest.importorskip("rclpy", reason="needs ROS 2")
    session = Ros()
    yield session
    session.close()


@pytest.fixture
def spin_until(ros: Ros) -> Callable[..., Any]:
    return ros.spin_until


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: the tiny models of the trainer's tests gain nothing from more, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
