"""Node parameters that are typed, described and checked in one place.

A node lists its parameters as `Spec`s; `Parameters` declares them with descriptors that `ros2 param describe`
shows and refuses wrong values with a reason that names the parameter, the value found and what is allowed.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class ParameterError(ValueError):
    """A parameter that was given a value it cannot have; the message is one line."""


def no_robot_file() -> ParameterError:
    return ParameterError("parameter 'robot_file': found '', give a robot file or a checkpoint folder")


@dataclass(frozen=True)
class Spec:
    """One parameter. The type is the default's; a whole number is taken for a float."""

    name: str
    default: bool | int | float | str
    description: str
    low: float | None = None  # smallest and largest allowed value, both inclusive; numbers have both or neither
    high: float | None = None
    choices: tuple[str, ...] = ()
    read_only: bool = False  # set when the node starts, never after
    configured: bool = False  # read by configure: refused while the node is configured (see `Parameters.frozen`)

    def fault(self, value: Any) -> str | None:
        """Why `value` is refused, or None."""
        kind = type(self.default)
        found = f"parameter '{self.name}': found {value!r}, "
        number = kind in (int, float) and not isinstance(value, bool)
        if not (isinstance(value, kind) or (kind is float and isinstance(value, int))) or (
            isinstance(value, bool) and kind is not bool
        ):
            return f"{found}must be {TYPE_NAMES[kind]}"
        if number and not math.isfinite(value):
            return f"{found}must be finite"
        if number and self.low is not None and not self.low <= value <= self.high:
            return f"{found}must be from {self.low:g} to {self.high:g}"
        if self.choices and value not in self.choices:
            return f"{found}must be one of {', '.join(repr(choice) for choice in self.choices)}"
        return None

    def descriptor(self) -> ParameterDescriptor:
        """What `ros2 param describe` shows."""
        # Dynamic typing so that `rate:=10` reaches `fault`, which takes it, instead of rclpy, which does not.
        descriptor = ParameterDescriptor(description=self.description, read_only=self.read_only, dynamic_typing=True)
        if self.choices:
            descriptor.additional_constraints = f"one of: {', '.join(repr(choice) for choice in self.choices)}"
        if self.low is not None and isinstance(self.default, float):
            descriptor.floating_point_range = [
                FloatingPointRange(from_value=float(self.low), to_value=float(self.high))
            ]
        elif self.low is not None:
            descriptor.integer_range = [IntegerRange(from_value=int(self.low), to_value=int(self.high))]
        return descriptor


class Parameters:
    """The declared parameters of a node: `parameters["rate"]` is the present value.

    Args:
        node: the node that gets them.
        specs: the parameters.
        on_change: called after a change was accepted, with {name: value} of what changed; not at declaration.

    Raises:
        ParameterError: a value given at start (command line, params file) is refused.
    """

    def __init__(
        self, node: Node, specs: Sequence[Spec], on_change: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self._node = node
        self._specs = {spec.name: spec for spec in specs}
        self.frozen = False  # the node is configured: `configured` parameters refuse changes
        node.add_on_set_parameters_callback(self._judge)
        for spec in specs:
            try:
                node.declare_parameter(spec.name, spec.default, spec.descriptor())
            except ParameterException as error:
                said = str(error.args[0])  # Humble's errors have the name as a second argument
                reason = said.partition("Reason: ")[2].removesuffix(f": {spec.name}") or said
                raise ParameterError(reason) from None
        self._refuse_unknown()
        if on_change is not None:
            _after_each_change(node, lambda changed: self._tell(on_change, changed))

    def _refuse_unknown(self) -> None:
        """rclpy drops what a command line or a file gives and no node declares. Misspelt, that may be a limit."""
        for name in self._node._parameter_overrides:  # noqa: SLF001 - there is no public way to them
            if self._node.has_parameter(name) or name.startswith("qos_overrides."):
                continue
            said = f"parameter '{name}': no such parameter"
            if meant := difflib.get_close_matches(name, self._specs, 1, 0.85):
                raise ParameterError(f"{said}, did you mean '{meant[0]}'?")
            self._node.get_logger().warning(f"{said}, it is ignored; --help lists them")

    def __getitem__(self, name: str) -> Any:
        value = self._node.get_parameter(name).value
        return float(value) if isinstance(self._specs[name].default, float) else value

    def values(self) -> dict[str, Any]:
        """All present values by name."""
        return {name: self[name] for name in self._specs}

    def _judge(self, proposed: list[Parameter]) -> SetParametersResult:
        mine = [parameter for parameter in proposed if parameter.name in self._specs]
        for parameter in mine:
            spec = self._specs[parameter.name]
            if self.frozen and spec.configured:
                reason = f"parameter '{spec.name}': only while the node is unconfigured (cleanup first)"
                return SetParametersResult(successful=False, reason=reason)
            if reason := spec.fault(parameter.value):
                return SetParametersResult(successful=False, reason=reason)
        return SetParametersResult(successful=True)

    def _tell(self, on_change: Callable[[dict[str, Any]], None], changed: list[Parameter]) -> None:
        mine = {parameter.name: self[parameter.name] for parameter in changed if parameter.name in self._specs}
        if mine:
            on_change(mine)


def _after_each_change(node: Node, tell: Callable[[list[Parameter]], None]) -> None:
    """Call `tell` with the parameters that were set, after they are."""
    if hasattr(node, "add_post_set_parameters_callback"):
        node.add_post_set_parameters_callback(tell)
        return
    # Humble's rclpy has none. All that sets parameters there, its services too, goes through these two.
    each, at_once = node.set_parameters, node.set_parameters_atomically

    def set_parameters(given: list[Parameter]) -> list[SetParametersResult]:
        results = each(given)
        tell([parameter for parameter, result in zip(given, results, strict=True) if result.successful])
        return results

    def set_parameters_atomically(given: list[Parameter]) -> SetParametersResult:
        result = at_once(given)
        if result.successful:
            tell(given)
        return result

    node.set_parameters, node.set_parameters_atomically = set_parameters, set_parameters_atomically


Sections = dict[str, list[str]]  # params file -> the nodes that it has parameters for, as it names them


def refuse_misspelt_sections(program: str, sections: Sections) -> None:
    """Params files name nodes, and what they say to one that there is not is ignored without a word.

    Raises:
        ParameterError: a section is for something much like `program`.
    """
    for file, names in sections.items():
        others = [name for name in names if not name.rpartition("/")[2].startswith(program)]
        if difflib.get_close_matches(program, [name.rpartition("/")[2] for name in others], 1, 0.85):
            raise ParameterError(f"{file}: no section for {program}, found {', '.join(others)}; is it misspelt?")


def tell_of_other_sections(node: Node, program: str, sections: Sections) -> None:
    """Say which params files have nothing for this node."""
    me = node.get_fully_qualified_name()
    for file, names in sections.items():
        if any(re.fullmatch(_pattern(name), me) for name in names):
            continue
        found = f"{file}: no section for {me}, found {', '.join(names) or 'none'}"
        if any(name.rpartition("/")[2].startswith(program) for name in names):  # of another robot, maybe
            node.get_logger().warning(found)
        else:  # a file for all nodes of a launch need not name each
            node.get_logger().info(found)


def sections_of_files(args: Sequence[str]) -> Sections:
    """Of the params files among a program's arguments."""
    found: Sections = {}
    for file in (value for option, value in itertools.pairwise(args) if option == "--params-file"):
        try:
            if Path(file).is_file():  # a pipe has been read already
                found[file] = list(_sections(yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):  # ROS reads YAML a little otherwise, and has its say
            continue
    return found


def _sections(tree: Any, name: str = "") -> Iterator[str]:
    """Names of the nodes that a params file has parameters for."""
    for key, below in tree.items() if isinstance(tree, dict) else ():
        if key == "ros__parameters":
            yield name
        else:
            yield from _sections(below, f"{name}/{str(key).strip('/')}")


def _pattern(name: str) -> str:
    """The expression for the nodes that a section is for: * is one part of a name, ** any number of them."""
    parts = {"*": "/[^/]+", "**": "(/[^/]+)*"}
    return "".join(parts.get(part, f"/{re.escape(part)}") for part in name.strip("/").split("/"))


def usage(program: str, specs: Sequence[Spec]) -> str:
    """What `program --help` prints: every parameter with its default and what it may be."""
    lines = [f"usage: {program} --ros-args -p NAME:=VALUE ... --params-file FILE", "", "parameters:"]
    lines += [f"  {spec.name} ({spec.default!r}): {spec.description}{_allowed(spec)}" for spec in specs]
    return "\n".join(lines)


def _allowed(spec: Spec) -> str:
    if spec.choices:
        return f"; one of: {', '.join(repr(choice) for choice in spec.choices)}"
    return "" if spec.low is None else f"; from {spec.low:g} to {spec.high:g}"
