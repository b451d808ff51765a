"""ALOHA's joint flips and gripper curves, which the published pi0 ALOHA checkpoints were trained with.

Fourteen dimensions: six joints and a gripper, left arm and right. Robot side: ALOHA's joint signs, grippers 0 = closed
to 1 = open by finger travel. Model side: pi's signs, grippers by motor angle. State and actions have different gripper
maps, and the state's is never inverted (openpi: policies/aloha_policy.py, adapt_to_pi).
"""

from __future__ import annotations

import numpy as np

Data = dict[str, np.ndarray]

JOINTS = 14
_FLIPS = np.array([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0] * 2)
_GRIPPERS = [6, 13]
_FINGER_OPEN, _FINGER_CLOSED = 0.05800, 0.01844  # metres
_ARM, _HORN = 0.036, 0.022  # metres, the links between motor and finger
_PI_OPEN, _PI_CLOSED = 1.6296, 0.5476  # radians, the range that pi was trained on
_ALOHA_OPEN, _ALOHA_CLOSED = 1.4910, -0.6213  # radians, that of ALOHA's own gripper


def to_pi(data: Data) -> Data:
    """State and actions [..., 14] of an ALOHA robot -> pi's space."""
    data = {key: value * _FLIPS for key, value in data.items()}
    if "state" in data:
        data["state"][..., _GRIPPERS] = _finger_to_angle(data["state"][..., _GRIPPERS])
    if "actions" in data:
        angle = data["actions"][..., _GRIPPERS] * (_ALOHA_OPEN - _ALOHA_CLOSED) + _ALOHA_CLOSED
        data["actions"][..., _GRIPPERS] = angle - _PI_CLOSED
    return data


def from_pi(data: Data) -> Data:
    """Actions [..., 14] in pi's space -> an ALOHA robot's; the state is left out, since nothing needs it any more."""
    actions = data["actions"] * _FLIPS
    angle = actions[..., _GRIPPERS] + _PI_CLOSED
    actions[..., _GRIPPERS] = (angle - _ALOHA_CLOSED) / (_ALOHA_OPEN - _ALOHA_CLOSED)
    return {"actions": actions}


def _finger_to_angle(travel: np.ndarray) -> np.ndarray:
    finger = travel * (_FINGER_OPEN - _FINGER_CLOSED) + _FINGER_CLOSED
    sine = (_HORN**2 + finger**2 - _ARM**2) / (2 * _HORN * finger)
    return (np.arcsin(np.clip(sine, -1.0, 1.0)) - _PI_CLOSED) / (_PI_OPEN - _PI_CLOSED)
